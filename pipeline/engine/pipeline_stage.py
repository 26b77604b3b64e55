"""Micro-batches through one of several pipeline stages.

Each stage is a DeepSpeed engine of its own over its own data-parallel ranks, at any ZeRO level;
what travels between stages is the business of `pipeline.stages.runner`. Here DeepSpeed is told of
the one thing that it does not expect: several micro-batches between forward and backward.
"""

import functools
from collections.abc import Iterable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn

from data_prep.loading.loader import Batch
from model.errors import TrainingError
from model.language_model import MultiTokenModel
from pipeline.config.run_config import RunConfig
from pipeline.distributed.topology import Topology
from pipeline.engine.evaluation import evaluate_heads
from pipeline.engine.optimizer_share import OptimizerShare
from pipeline.stages.costs import micro_batch_order
from pipeline.stages.links import StageLinks
from pipeline.stages.plan import depths, num_depths
from pipeline.stages.runner import MicroBatchEngine, StageRunner, activation_shape


class PipelineStage:
    """Forward and backward of this rank's stage; an `Execution`.

    The LM head (final norm and unembedding) is trained in the stage of head 1. The other stages
    with heads have copies, whose gradients are summed there before the optimizer moves and whose
    values come from there after it has.

    Args:
        config: the run.
        topology: the grid of ranks, with more than one stage.
        deepspeed_engine: what `deepspeed.initialize` returned.
        share: what this rank owns of weights, gradients and moments.
        dtype: of activations.
    """

    def __init__(
        self,
        config: RunConfig,
        topology: Topology,
        deepspeed_engine: Any,
        share: OptimizerShare,
        dtype: torch.dtype,
    ) -> None:
        self._config = config
        self._topology = topology
        self._chunk_tokens = config.train.chunk_tokens(topology.device.type)
        self._engine = deepspeed_engine
        self._model: MultiTokenModel = deepspeed_engine.module
        self._share = share
        self._links = StageLinks(topology, dtype)
        partitioned = config.parallel.zero == 3
        self._lm_head_partitioned = partitioned and self._model.part.owns_lm_head
        self.runner = StageRunner(
            self._model,
            MicroBatchEngine(self._forward, self._begin_backward, self._backward),
            topology,
            self._links,
            functools.partial(
                micro_batch_order,
                depths(topology.plan, config.model)[topology.stage],
                num_depths(topology.plan, config.model),
            ),
            chunk_tokens=self._chunk_tokens,
            sparse_first_gradient=partitioned,
        )
        share.trace_whole_steps(topology.get_data_parallel_group())
        self.weights_changed()

    def run(
        self, batches: list[Batch], scales: Tensor, sequence_losses: Tensor | None = None
    ) -> Tensor:
        """Forward and backward of a step's micro-batches; see `Execution.run`."""
        self._share.begin_trace()
        return self.runner.run(batches, scales, sequence_losses)

    def _forward(
        self, inputs: Tensor, documents: Tensor | None
    ) -> tuple[Tensor, list[tuple[nn.Module, int]]]:
        output = self._engine(inputs, documents=documents)
        return output, self._share.gradients_to_come()

    def _begin_backward(self, to_come: list[tuple[nn.Module, int]], is_last: bool) -> None:
        self._share.begin_backward()
        self._share.expect_gradients(to_come)
        self._engine.set_gradient_accumulation_boundary(is_last)

    def _backward(self, surrogate: Tensor) -> None:
        self._engine.backward(surrogate, scale_wrt_gas=False)

    def evaluate(self, batches: Iterable[Batch], sequence_losses: Tensor | None = None) -> Tensor:
        """Sum of `evaluate_heads` over batches, for all heads; see `Execution.evaluate`."""
        heads = self._config.model.future_tokens
        sums = torch.zeros(3 * heads, dtype=torch.float64, device=self._topology.device)
        with self._links.clock.uncounted():
            for index, batch in enumerate(batches):
                told = None if sequence_losses is None else sequence_losses[index]
                sums += self._evaluate(batch, told)
            self._links.finish_sends()
            dist.all_reduce(sums, group=self._topology.activation_group)
        return sums

    def _evaluate(self, batch: Batch, sequence_losses: Tensor | None) -> Tensor:
        """What `evaluate_heads` gives for the heads of this stage; zeros without heads."""
        links, inputs = self._links, batch.tokens
        if links.activations_in is not None:
            links.activations_in.expect([activation_shape(batch, self._model)])
            inputs = links.activations_in.receive()

        def pass_on(output: Tensor) -> Tensor:
            send = links.activations_out.send if links.activations_out is not None else None
            of_heads = bool(self._model.heads.numbers) and self._config.model.chain
            if send is not None and not of_heads:
                send(output)
            if not self._model.heads.numbers:
                heads = self._config.model.future_tokens
                return torch.zeros(3 * heads, dtype=torch.float64, device=output.device)
            return evaluate_heads(
                self._model,
                output,
                batch,
                chunk_tokens=self._chunk_tokens,
                head_group=self._topology.head_group,
                pass_on=send if of_heads else None,
                sequence_losses=sequence_losses,
            )

        self._share.begin_trace()
        sums: Tensor = self._engine(inputs, pass_on, documents=batch.documents)
        return sums

    def weights_changed(self) -> None:
        """Give the stages that hold a copy of the LM head its values; a collective."""
        if self._topology.head_group is None:
            return
        with self._whole_lm_head():
            for weight in self._lm_head():
                owner = self._topology.lm_head_owner
                dist.broadcast(weight.data, owner, group=self._topology.head_group)

    def check(self) -> None:
        """See that all stages with heads compute with the same LM head, to the bit; a collective.

        Raises:
            TrainingError: they do not.
        """
        group = self._topology.head_group
        if group is None:
            return
        with self._whole_lm_head():
            digests = [_digest(weight) for weight in self._lm_head()]
        found: list[list[str]] = [[] for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(found, digests, group=group)
        if any(other != digests for other in found):
            raise TrainingError(
                "the stages with heads hold different final norms or unembeddings, which must not "
                "happen; nothing was saved: resume from the last checkpoint, and suspect the "
                f"memory of the nodes of {self._topology.describe()} and its chain"
            )

    def _lm_head(self) -> list[Tensor]:
        """What all stages with heads share of it."""
        lm_head = self._model.heads.lm_head
        if self._config.model.lm_head == "replicated":
            return [lm_head.norm_weight]
        return [lm_head.norm_weight, lm_head.weight]

    def _whole_lm_head(self) -> Any:
        """A context in which this stage's LM head is whole; a collective."""
        return deepspeed.zero.GatheredParameters(self._lm_head(), enabled=self._lm_head_partitioned)

    def idle_fractions(self) -> list[float]:
        """Share of the steps since the last call that each stage waited; a collective."""
        return self.runner.idle_fractions()

    def own_seconds(self) -> float | None:
        """Of the steps that the last `idle_fractions` was about, without the waiting."""
        return self.runner.own_s if self._topology.device.type == "cuda" else None

    @property
    def waiting_for(self) -> str | None:
        """Which transfer this rank is waiting for, if any."""
        return self._links.clock.waiting_for


def _digest(weight: Tensor) -> str:
    raw = weight.detach().cpu().contiguous().view(torch.uint8)
    return xxhash.xxh3_128_hexdigest(raw.numpy().tobytes())
