"""The engine of one pipeline stage: its part of the model, its own DeepSpeed engine.

Each stage is a DeepSpeed engine of its own over its own data-parallel ranks, with any ZeRO stage;
what travels between stages is `pipeline.stages.runner`'s business. Here DeepSpeed is told of the
one thing it does not expect: several micro-batches between their forward and their backward.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn

from data_prep.loading.loader import Batch
from model.errors import TrainingError
from model.hugging_face.importing import ImportedWeights
from model.part import ModelPart
from pipeline.checkpoint.sharded_tensors import Snapshot
from pipeline.config.run_config import Precision, RunConfig
from pipeline.distributed.topology import Topology
from pipeline.engine.engine import (
    Engine,
    confine_trace_check,
    gathered,
)
from pipeline.engine.evaluation import evaluate_heads
from pipeline.stages.costs import micro_batch_order
from pipeline.stages.links import StageLinks
from pipeline.stages.plan import depths, num_depths
from pipeline.stages.runner import MicroBatchEngine, StageRunner, activation_shape

# DeepSpeed's name for ZeRO-3's count, per module, of input gradients that are still to arise.
_GRADIENTS_TO_COME = "ds_grads_remaining"


class StagedEngine(Engine):
    """One stage's part of the model on this rank, wrapped by DeepSpeed.

    The final norm and the unembedding are trained in the stage of head 1. The other stages with
    heads have copies, whose gradients are summed there before the optimizer moves and whose
    values come from there after it has.

    Args:
        config: the run.
        topology: the grid of ranks, with more than one stage.
        precision: arithmetic of weights and activations.
        imported: initial weights from elsewhere (`model.hugging_face`); None = all fresh.
    """

    def __init__(
        self,
        config: RunConfig,
        topology: Topology,
        precision: Precision,
        imported: ImportedWeights | None = None,
    ) -> None:
        super().__init__(config, topology, precision, imported)
        self._links = StageLinks(topology, self.dtype)
        order = functools.partial(
            micro_batch_order, depths(topology.plan)[topology.stage], num_depths(topology.plan)
        )
        self._runner = StageRunner(
            self.model,
            MicroBatchEngine(self._forward, self._begin_backward, self._backward),
            topology,
            self._links,
            order,
            chunk_tokens=config.train.loss_chunk_tokens,
            sparse_first_gradient=self._zero == 3,
        )
        self._begins_trace = True
        if self._zero == 3:
            confine_trace_check(topology.get_data_parallel_group())
            self._trace_whole_steps()
        self._spread_readout()

    def _part(self) -> ModelPart:
        return self.topology.plan[self.topology.stage]

    def _trace_whole_steps(self) -> None:
        """Let ZeRO-3 learn the order of a whole step, to prefetch by.

        Its own trace begins anew with every forward and takes it that the backward of the same
        micro-batch follows; with several in flight it would never hold.
        """
        offload = self._engine.optimizer.parameter_offload
        offload.fwd_pre_hook.remove()

        def begin(_module: nn.Module, _inputs: Any) -> None:
            if self._begins_trace:
                self._begins_trace = False
                offload.get_param_coordinator().reset_step()

        self.model.register_forward_pre_hook(begin, prepend=True)

    def _run_micro_batches(self, batches: list[Batch], scales: Tensor) -> Tensor:
        self._begins_trace = True
        return self._runner.run(batches, scales)

    def _forward(self, inputs: Tensor, documents: Tensor | None) -> tuple[Tensor, Any]:
        output = self._engine(inputs, documents=documents)
        return output, self._gradients_to_come()

    def _begin_backward(self, to_come: list[tuple[nn.Module, int]], is_last: bool) -> None:
        if self._zero:
            # DeepSpeed counts a micro-batch when the next forward begins, which may be never.
            self._engine.optimizer.clear_backward_seen_flag()
        for module, count in to_come:
            module.__dict__[_GRADIENTS_TO_COME] = count
        self._engine.set_gradient_accumulation_boundary(is_last)

    def _backward(self, remainder: Tensor) -> None:
        self._engine.backward(remainder, scale_wrt_gas=False)

    def _gradients_to_come(self) -> list[tuple[nn.Module, int]]:
        """What ZeRO-3 waits for, per module, before it frees the weights in backward.

        Every forward sets it anew; the backward of an earlier micro-batch needs the earlier one.
        """
        if self._zero != 3:
            return []
        return [
            (module, module.__dict__[_GRADIENTS_TO_COME])
            for module in self.model.modules()
            if _GRADIENTS_TO_COME in module.__dict__
        ]

    def _apply(self) -> float | None:
        norm = super()._apply()
        if norm is not None:
            self._spread_readout()
        return norm

    def _readout(self) -> list[Tensor]:
        return [self.model.heads.lm_head.norm_weight, self.model.heads.lm_head.weight]

    def _whole_readout(self) -> Any:
        """A context in which this stage's readout is whole."""
        trained = self.model.part.owns_lm_head
        return gathered(self._readout(), partitioned=trained and self._zero == 3)

    def _spread_readout(self) -> None:
        """Give the stages that hold a copy of the readout its values."""
        if self.topology.head_group is None:
            return
        with self._whole_readout():
            for weight in self._readout():
                owner = self.topology.readout_owner
                dist.broadcast(weight.data, owner, group=self.topology.head_group)

    def _check_copies(self) -> None:
        """See that all stages with heads compute with the same readout, to the bit.

        Raises:
            TrainingError: they do not.
        """
        group = self.topology.head_group
        if group is None:
            return
        with self._whole_readout():
            digests = [_digest(weight) for weight in self._readout()]
        found: list[list[str]] = [[] for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(found, digests, group=group)
        if any(other != digests for other in found):
            raise TrainingError(
                "the stages with heads hold different final norms or unembeddings, which must not "
                "be; nothing was saved: resume from the last checkpoint, and suspect the memory of "
                f"the nodes of {self.topology.describe()} and its chain"
            )

    def _evaluate_batches(self, batches: Iterator[Batch]) -> Tensor:
        with self._links.clock.uncounted():
            sums = super()._evaluate_batches(batches)
            self._links.finish_sends()
            dist.all_reduce(sums, group=self.topology.activation_group)
        return sums

    def _evaluate_batch(self, batch: Batch) -> Tensor:
        links, inputs = self._links, batch.tokens
        if links.activations_in is not None:
            links.activations_in.expect([activation_shape(batch, self.model)])
            inputs = links.activations_in.receive()

        def hand_on(output: Tensor) -> Tensor:
            if links.activations_out is not None:
                links.activations_out.send(output)
            if not self.model.heads.numbers:
                heads = self.config.model.future_tokens
                return torch.zeros(3 * heads, dtype=torch.float64, device=output.device)
            return evaluate_heads(
                self.model,
                output,
                batch,
                chunk_tokens=self.config.train.loss_chunk_tokens,
                head_group=self.topology.head_group,
            )

        self._begins_trace = True
        sums: Tensor = self._engine(inputs, hand_on, documents=batch.documents)
        return sums

    def stage_idle_fractions(self) -> list[float]:
        """Share of the steps since the last call that each stage waited; a collective."""
        return self._runner.idle_fractions()

    @property
    def waiting_for(self) -> str | None:
        """Which transfer this rank is waiting for, if any."""
        return self._links.clock.waiting_for

    def snapshot(self) -> Snapshot:
        """This rank's share of weights and optimizer states, as views that training changes.

        Raises:
            TrainingError: the stages' copies of the readout differ.
        """
        self._check_copies()
        return super().snapshot()

    def load(self, directory: Path) -> None:
        """Read weights and optimizer states that were saved in any layout; a collective.

        Raises:
            CheckpointError: the files do not hold this model.
        """
        super().load(directory)
        self._spread_readout()


def build_engine(
    config: RunConfig,
    topology: Topology,
    precision: Precision,
    imported: ImportedWeights | None = None,
) -> Engine:
    """The engine of this rank: of the whole model, or of its stage."""
    kind = StagedEngine if topology.num_stages > 1 else Engine
    return kind(config, topology, precision, imported)


def _digest(weight: Tensor) -> str:
    raw = weight.detach().cpu().contiguous().view(torch.uint8)
    return xxhash.xxh3_128_hexdigest(raw.numpy().tobytes())
