"""Micro-batches through a model that this rank holds whole (or its tensor-parallel part of)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from data_prep.loading.loader import Batch
from model.backward import joint_loss, sequential_backward
from model.language_model import MultiTokenModel
from pipeline.config.run_config import RunConfig
from pipeline.engine.evaluation import evaluate_heads


class SingleStage:
    """Forward and backward of a run without pipeline stages; an `Execution`.

    Args:
        config: the run.
        deepspeed_engine: what `deepspeed.initialize` returned.
        device: where this rank computes.
    """

    waiting_for: str | None = None

    def __init__(self, config: RunConfig, deepspeed_engine: Any, device: torch.device) -> None:
        self._device = device
        self._config = config
        self._chunk_tokens = config.train.chunk_tokens(device.type)
        self._engine = deepspeed_engine
        self._model: MultiTokenModel = deepspeed_engine.module
        # On a GPU: before and after what no other rank takes part in.
        self._own_work: list[tuple[Any, Any]] = []

    def run(
        self, batches: list[Batch], scales: Tensor, sequence_losses: Tensor | None = None
    ) -> Tensor:
        """Forward and backward of a step's micro-batches; see `Execution.run`."""
        sums = torch.zeros_like(scales)
        for index, batch in enumerate(batches):
            self._engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
            losses = None if sequence_losses is None else sequence_losses[index]
            sums += self._micro_step(batch, scales, losses)
        return sums

    def _micro_step(self, batch: Batch, scales: Tensor, sequence_losses: Tensor | None) -> Tensor:
        """Forward and backward of one micro-batch; each head's local loss sum `[n]`."""
        begun = self._now()
        if self._config.train.head_backward == "joint":

            def joint(trunk_output: Tensor) -> tuple[Tensor, Tensor]:
                return joint_loss(
                    self._model,
                    trunk_output,
                    batch.labels,
                    scales,
                    chunk_tokens=self._chunk_tokens,
                    documents=batch.documents,
                )

            sums, surrogate = self._engine(batch.tokens, joint, documents=batch.documents)
            # DeepSpeed divides the gradient of what a forward returned by the accumulation, unless
            # it has seen the loss before; without ZeRO it has not when the two are one tensor.
            surrogate = surrogate * 1.0
        else:
            trunk_output = self._engine(batch.tokens, documents=batch.documents)
            sums, surrogate = sequential_backward(
                self._model,
                trunk_output,
                batch.labels,
                scales,
                chunk_tokens=self._chunk_tokens,
                documents=batch.documents,
                sequence_losses=sequence_losses,
            )
        if begun is not None:  # the trunk's backward, which follows, has the reduction in it
            self._own_work.append((begun, self._now()))
        self._engine.backward(surrogate, scale_wrt_gas=False)
        return sums.float()

    def own_seconds(self) -> float | None:
        """Of the trunk's forward and the heads, on a GPU; ZeRO-3 gathers weights within."""
        if self._device.type != "cuda":
            return None
        work, self._own_work = self._own_work, []
        if work:
            work[-1][1].synchronize()
        return sum(float(begin.elapsed_time(end)) for begin, end in work) / 1000

    def _now(self) -> Any:
        """An event on a GPU's stream; None on a CPU."""
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def evaluate(self, batches: Iterable[Batch]) -> Tensor:
        """Sum of `evaluate_heads` over batches: `[3 * n]`."""
        heads = self._config.model.future_tokens
        sums = torch.zeros(3 * heads, dtype=torch.float64, device=self._device)
        for batch in batches:
            sums += self._evaluate(batch)
        return sums

    def _evaluate(self, batch: Batch) -> Tensor:
        def heads(trunk_output: Tensor) -> Tensor:
            return evaluate_heads(
                self._model,
                trunk_output,
                batch,
                chunk_tokens=self._chunk_tokens,
            )

        sums: Tensor = self._engine(batch.tokens, heads, documents=batch.documents)
        return sums

    def weights_changed(self) -> None:
        """No other rank holds copies."""

    def check(self) -> None:
        """No other rank holds copies."""

    def idle_fractions(self) -> list[float]:
        """One stage has no other to wait for."""
        return []
