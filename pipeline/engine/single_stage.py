"""Micro-batches through a model that this rank holds whole (or its tensor-parallel part of)."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_prep.loading.loader import Batch
from model.backward import joint_loss, sequential_backward
from model.language_model import MultiTokenModel
from model.memory.unrolling import windows
from pipeline.config.run_config import RunConfig
from pipeline.engine.evaluation import evaluate_heads


class _Pass(NamedTuple):
    """A forward and backward of the whole model.

    Attributes:
        forward: of the engine, which takes what follows the trunk.
        scored: what the trunk's output is of.
        sequence_losses: `[B]`, gets head 1's loss sum of each sequence added; or None.
    """

    forward: Callable[..., Any]
    scored: Batch
    sequence_losses: Tensor | None


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
        passes = [
            one
            for index, batch in enumerate(batches)
            for one in self._passes(
                batch, None if sequence_losses is None else sequence_losses[index]
            )
        ]
        for index, one in enumerate(passes):
            self._engine.set_gradient_accumulation_boundary(index == len(passes) - 1)
            sums += self._forward_backward(one, scales)
        return sums

    def _passes(self, batch: Batch, sequence_losses: Tensor | None) -> list["_Pass"]:
        """What a micro-batch is run in: one pass, or of a model with a memory one a window.

        To DeepSpeed each is a micro-batch of its own, so that every parameter has one gradient in
        every backward, and no more than a window's activations exist at a time.
        """
        forward = functools.partial(self._engine, batch.tokens, documents=batch.documents)
        sizes = self._config.model.memory
        if sizes is None:
            return [_Pass(forward, batch, sequence_losses)]
        memories: list[Tensor] = []
        return [
            _Pass(
                functools.partial(forward, window=window, memories=memories),
                _columns(batch, window.scored * sizes.segment, window.stop * sizes.segment),
                sequence_losses,
            )
            for window in windows(sizes, batch.tokens.shape[1])
        ]

    def _forward_backward(self, one: "_Pass", scales: Tensor) -> Tensor:
        """Forward and backward of one pass; each head's local loss sum `[n]`."""
        begun = self._now()
        labels, documents = one.scored.labels, one.scored.documents
        if self._config.train.head_backward == "joint":

            def joint(trunk_output: Tensor) -> tuple[Tensor, Tensor]:
                return joint_loss(
                    self._model,
                    trunk_output,
                    labels,
                    scales,
                    chunk_tokens=self._chunk_tokens,
                    documents=documents,
                )

            sums, surrogate = one.forward(joint)
            # DeepSpeed divides the gradient of what a forward returned by the accumulation, unless
            # it has seen the loss before; without ZeRO it has not when the two are one tensor.
            surrogate = surrogate * 1.0
        else:
            trunk_output = one.forward()
            sums, surrogate = sequential_backward(
                self._model,
                trunk_output,
                labels,
                scales,
                chunk_tokens=self._chunk_tokens,
                documents=documents,
                sequence_losses=one.sequence_losses,
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

    def evaluate(self, batches: Iterable[Batch], sequence_losses: Tensor | None = None) -> Tensor:
        """Sum of `evaluate_heads` over batches; see `Execution.evaluate`."""
        heads = self._config.model.future_tokens
        sums = torch.zeros(3 * heads, dtype=torch.float64, device=self._device)
        for index, batch in enumerate(batches):
            told = None if sequence_losses is None else sequence_losses[index]
            sums += self._evaluate(batch, told)
        return sums

    def _evaluate(self, batch: Batch, sequence_losses: Tensor | None) -> Tensor:
        def heads(trunk_output: Tensor) -> Tensor:
            return evaluate_heads(
                self._model,
                trunk_output,
                batch,
                chunk_tokens=self._chunk_tokens,
                sequence_losses=sequence_losses,
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


def _columns(batch: Batch, start: int, stop: int) -> Batch:
    """Some positions of all sequences."""
    documents = batch.documents
    return Batch(
        batch.tokens[:, start:stop],
        batch.labels[:, :, start:stop],
        None if documents is None else documents[:, start:stop],
    )
