"""Memory that tensors of a rank take at most, item by item, from the sizes alone.

P elements on a rank of a stage (tensor parallelism has divided them), D data-parallel ranks, e
bytes of a weight. Weights, fp32 weights with Adam's moments, and gradients:

    no ZeRO, fp32    4 P                8 P            4 P
    level 1          e P               12 P / D        4 P        bf16 without ZeRO: as level 1
    level 2          e P               12 P / D        4 P / D
    level 3          e P / D           12 P / D        4 P / D, and min(P, 10^9) e gathered

A step has three moments that may be its most:

    computing    these, the bucket that gradients are reduced in, activations, one chunk's logits
    reducing     at the end of the last backward: one layer's activations, what reducing copies
    stepping     Adam on its share: a flat copy of its gradients

`benchmarks/plan.py` holds all this against the tensors of small runs.
"""

from typing import NamedTuple

from model.structure.activation_memory import layer_activation_bytes
from pipeline.engine.deepspeed_config import (
    FP32_REDUCTION_FROM_RANKS,
    MAX_LIVE_PARAMETERS,
    optimizer_level,
)
from pipeline.planning.layout import Layout, Machine, Work
from pipeline.planning.parameters import RankParameters, rank_parameters
from pipeline.stages.memory import MicroBatch, loss_bytes, stage_activation_bytes

_FP32 = 4
# Bytes of an element's two moments in fp32, and of these with its fp32 weight.
_MOMENTS, _STATES = 8, 12
# Elements that DeepSpeed without ZeRO copies together to reduce them.
_WHOLE_REDUCTION = 500_000_000


class RankMemory(NamedTuple):
    """Bytes of a rank, at most.

    Attributes:
        weights: that compute, with copies of the LM head in stages that do not train it.
        optimizer: fp32 weights beside them, and both moments.
        gradients: that are there while activations are.
        bucket: in which gradients are reduced.
        gathered: weights that ZeRO-3 holds whole.
        neighbors_copy: of `parallel.zero_hpz_partition_size`, until a step's end.
        activations: kept for backward, of all micro-batches in flight.
        passing: gradients of activations, while a layer runs backward.
        logits: of a chunk of the loss, and their gradient.
        lm_head: the LM head's gradient, added up over heads.
        reducing: in their place at the end of the last backward: all gradients, what reducing
            them copies, and one layer's activations.
        stepping: what the optimizer needs beside weights and its own states.
        loading: what a resume needs beside weights and optimizer.
        staying: what is neither weight nor optimizer state and stays between steps.
    """

    weights: float
    optimizer: float
    gradients: float
    bucket: float
    gathered: float
    neighbors_copy: float
    activations: float
    passing: float
    logits: float
    lm_head: float
    reducing: float
    stepping: float
    loading: float
    staying: float

    @property
    def states_total(self) -> float:
        """All that stays between two steps."""
        return self.weights + self.optimizer + self.staying

    @property
    def computing_total(self) -> float:
        """All that is there while a rank computes."""
        return (
            self._resident
            + self.bucket
            + self.gathered
            + self.gradients
            + self.activations
            + self.passing
            + self.logits
            + self.lm_head
        )

    @property
    def reducing_total(self) -> float:
        """All that is there at the end of a step's last backward."""
        return self._resident + self.bucket + self.gathered + self.reducing

    @property
    def stepping_total(self) -> float:
        """All that is there while the optimizer moves."""
        return self._resident + self.stepping

    @property
    def resume_total(self) -> float:
        """All that is there while a checkpoint is loaded."""
        return self.weights + self.optimizer + self.loading

    @property
    def total(self) -> float:
        """The most of a step."""
        return max(self.computing_total, self.reducing_total, self.stepping_total)

    @property
    def _resident(self) -> float:
        return self.weights + self.optimizer + self.neighbors_copy


def rank_memory(work: Work, layout: Layout, machine: Machine, stage: int) -> RankMemory:
    """What a rank of a stage needs."""
    part, size = layout.plan[stage], machine.element_bytes
    count = rank_parameters(part, work.model, layout.tensor, freeze=work.freeze)
    micro = micro_batch(work, layout, machine)
    kept = stage_activation_bytes(
        layout.plan, stage, work.model, micro, trunk_trained=work.freeze == "none"
    )
    logits = loss_bytes(work.model, micro, work.chunk_tokens) if part.heads else 0.0
    shared = count.lm_head * _FP32 if work.freeze == "none" else 0.0
    passing = 2 * work.model.ffn_hidden_size / layout.tensor * micro.tokens * size
    running = layer_activation_bytes(
        work.model,
        tokens=micro.tokens,
        checkpointing="none",
        tensor_size=layout.tensor,
        element_bytes=size,
    )
    level, data = _level(layout, size), layout.data
    return RankMemory(
        weights=count.held * size / (data if level == 3 else 1) + count.copied * size,
        optimizer=count.trained * (_MOMENTS if level == 0 else _STATES / data),
        gradients=_gradients(count, layout, size),
        bucket=_bucket(work, layout, size),
        gathered=min(count.held, MAX_LIVE_PARAMETERS) * size if layout.zero == 3 else 0.0,
        neighbors_copy=count.held * size / layout.neighbors if layout.neighbors > 1 else 0.0,
        activations=kept,
        passing=passing,
        logits=logits,
        lm_head=shared,
        reducing=_reducing(count, work, layout, size) + shared + running + passing,
        stepping=_stepping(count, work, layout, machine),
        loading=count.held * size / data if level in (1, 2) else 0.0,
        # ZeRO-3 makes its bucket and its sums once.
        staying=count.trained * _FP32 / data + _bucket(work, layout, size) if level == 3 else 0.0,
    )


def micro_batch(work: Work, layout: Layout, machine: Machine) -> MicroBatch:
    """The micro-batch of a layout, as formulas of activations want it."""
    return MicroBatch(
        tokens=layout.micro_tokens(work),
        tensor_size=layout.tensor,
        element_bytes=machine.element_bytes,
        checkpointing=layout.checkpointing,
        accumulation=layout.accumulation,
    )


def reduces_in_fp32(work: Work, layout: Layout, size: int) -> bool:
    """Whether gradients travel between ranks in fp32."""
    if work.fp32_reduction is None:
        return size == _FP32 or layout.data >= FP32_REDUCTION_FROM_RANKS
    return size == _FP32 or work.fp32_reduction


def _level(layout: Layout, size: int) -> int:
    """The ZeRO level at which DeepSpeed keeps gradients and optimizer states."""
    return optimizer_level(layout.zero, "fp32" if size == _FP32 else "bf16")


def _gradients(count: RankParameters, layout: Layout, size: int) -> float:
    """While activations are there: of earlier micro-batches, else of heads, which come first."""
    level = _level(layout, size)
    if level == 3:
        return count.trained * _FP32 / layout.data
    elements = count.trained if layout.accumulation > 1 else count.head_layers
    return elements * _FP32 / (layout.data if level == 2 else 1)


def _bucket(work: Work, layout: Layout, size: int) -> float:
    """DeepSpeed makes it whole, however small the model; without ZeRO it has none."""
    level = _level(layout, size)
    if level == 3 and reduces_in_fp32(work, layout, size):
        return work.bucket * _FP32
    return work.bucket * (0, _FP32, size, size)[level]


def _reducing(count: RankParameters, work: Work, layout: Layout, size: int) -> float:
    """Gradients at the end of the last backward, one that comes in, and a bucket's copies."""
    level, share = _level(layout, size), count.trained / layout.data
    filled = min(work.bucket, count.trained)
    sent = _FP32 if reduces_in_fp32(work, layout, size) else size
    incoming = max(count.lm_head, count.layer) * size
    if level == 0:
        return (count.trained + min(count.trained, _WHOLE_REDUCTION)) * _FP32
    if level == 1:  # fp32 sums of bf16 gradients are copied whole to the rank's share
        copied = share * _FP32 if size < _FP32 else filled * sent * (layout.data > 1)
        return count.trained * _FP32 + copied + incoming
    if level == 2:  # the step's earlier sums, and this micro-batch's
        return share * (_FP32 + size) + filled * sent + incoming
    return share * _FP32 + filled * _FP32 + incoming


def _stepping(count: RankParameters, work: Work, layout: Layout, machine: Machine) -> float:
    """Gradients of the rank's share, their flat copy or before it their norm, and what stays."""
    level, size = _level(layout, machine.element_bytes), machine.element_bytes
    share = count.trained / layout.data * _FP32
    if level == 0:
        return count.trained * _FP32
    # DeepSpeed keeps the sums of bf16 gradients flat from the start below level 3.
    copies = 1 if level in (1, 2) and size < _FP32 else 2
    kept = level == 3 or (copies == 1 == level and layout.data > 1)
    stays = _bucket(work, layout, size) if kept else 0.0
    # The norm is taken of one parameter after the other, each in float64.
    largest = max(count.lm_head, count.layer / 2) / (layout.data if level == 3 else 1)
    normed = min(largest * _FP32, share) * 2
    return stays + max(share * copies, share + normed)
