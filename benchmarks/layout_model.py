"""Time and memory of an optimizer step in any layout, from a few formulas.

Per stage and micro-batch of T tokens, with tensor-parallel size t and data-parallel size d:

    layer forward      (2 m T + 2 S H T) / (t F)       m matrix elements of a layer; attention
    LM head            6 V H T / (t F')                logits, gradient of z, gradient of weights
    backward           2 x forward, 3 x with recomputation; a head is forward and backward in one
    tensor parallel    2 all-reduces of T H e bytes a layer and direction: 2 (t-1)/t bytes / w
    ZeRO-3             gathers the stage's weights for forward and again for backward, scatters
                       their gradients after it: (d-1)/d P e / t bytes each, in rings of d - 1
                       messages a layer. Where it overlaps with computing, the longer of both
                       counts, else their sum.
    transfer           T H e / w to the next stage

`pipeline.stages.costs.step_time` plays the 1F1B schedule through with these times. Then, once a
step: ZeRO-1 reduces gradients (fp32 from 64 ranks on) and gathers weights, the stages with
heads add up the LM head's gradient and share its values, and the optimizer moves the rank's share.

Memory of a rank: weights, gradients and optimizer states as ZeRO divides them (bf16: 2 + 4 + 12 / d
bytes per parameter for ZeRO-1, (2 + 4 + 12) / d for ZeRO-3, and what it holds gathered), buckets,
one chunk's logits, the LM head's gradient, and the activations that `pipeline.stages.memory`
counts: per layer, token and micro-batch in flight
(4 + (2 + (2 G D + 3 f) / H) / t) H e bytes kept for backward, or H e with recomputation.

Not modelled: uneven machines, contention between collectives, launch overheads, padding, the
data loader, checkpoints.

Legend: S sequence, H hidden, V vocabulary, f feed-forward width, G key-value heads of width D,
P parameters of a stage, F FLOP/s of a rank, w bandwidth, e bytes of an element.
"""

from dataclasses import dataclass
from typing import NamedTuple

from model.config import ModelConfig
from model.part import ModelPart
from pipeline.engine.deepspeed_config import FP32_REDUCTION_FROM_RANKS
from pipeline.reporting.run_summary import part_parameters
from pipeline.stages.costs import StageCost, step_time
from pipeline.stages.memory import MicroBatch, loss_bytes, stage_activation_bytes
from pipeline.stages.plan import depths

# What pipeline/engine/deepspeed_config.py sets, in elements.
BUCKET, LIVE_PARAMETERS = 500_000_000, 1_000_000_000


@dataclass(frozen=True)
class Machine:
    """What ranks compute and communicate with.

    Attributes:
        name: for tables.
        ranks_per_node: ranks that share a node.
        flops: FLOP/s of a rank in transformer layers.
        lm_head_flops: FLOP/s of a rank in the chunked loss.
        intra_bandwidth: bytes/s of a rank in a collective within a node.
        inter_bandwidth: bytes/s between nodes, a rank's share of its node's network.
        latency_s: of a message; a ring of n ranks passes n - 1 on.
        optimizer_s: per parameter that a rank updates.
        memory_bytes: of a rank, that may be filled.
        element_bytes: of weights and activations.
        overlaps: whether ZeRO's traffic goes on while a rank computes.
    """

    name: str
    ranks_per_node: int
    flops: float
    lm_head_flops: float
    intra_bandwidth: float
    inter_bandwidth: float
    latency_s: float
    optimizer_s: float
    memory_bytes: float
    element_bytes: int = 2
    overlaps: bool = True


@dataclass(frozen=True)
class Work:
    """A model and what a step of it is.

    Attributes:
        model: sizes.
        sequence_length: S.
        chunk_tokens: tokens whose logits exist at once; by default as on a GPU.
    """

    model: ModelConfig
    sequence_length: int
    chunk_tokens: int = 4096


@dataclass(frozen=True)
class Layout:
    """How a run is spread over ranks.

    Attributes:
        plan: what each stage holds.
        data: data-parallel size.
        tensor: tensor-parallel size.
        zero: ZeRO level, 1 or 3.
        micro_size: samples of a micro-batch.
        accumulation: micro-batches of a step.
        recompute: whether layers run again in backward.
    """

    plan: tuple[ModelPart, ...]
    data: int
    tensor: int
    zero: int
    micro_size: int
    accumulation: int
    recompute: bool = False

    @property
    def ranks(self) -> int:
        """All of them."""
        return len(self.plan) * self.data * self.tensor


class Prediction(NamedTuple):
    """What the formulas give.

    Attributes:
        step_s: seconds of a step.
        idle: share of the pipeline's time that each stage waits.
        memory_bytes: of a rank of each stage.
    """

    step_s: float
    idle: list[float]
    memory_bytes: list[float]


def predict(work: Work, layout: Layout, machine: Machine) -> Prediction:
    """Time and memory of a step."""
    costs = [micro_batch_cost(work, layout, machine, part) for part in layout.plan]
    depth_of = depths(layout.plan)
    sent = _tokens(work, layout) * work.model.hidden_size * machine.element_bytes
    bandwidth = _stage_bandwidth(layout, machine)
    transfer = sent / bandwidth + machine.latency_s if len(layout.plan) > 1 else 0.0
    pipeline_s = step_time(costs, depth_of, layout.accumulation, transfer)
    return Prediction(
        pipeline_s + _once_a_step(work, layout, machine),
        [1 - layout.accumulation * cost.total / pipeline_s for cost in costs],
        [memory(work, layout, machine, stage) for stage in range(len(layout.plan))],
    )


def micro_batch_cost(work: Work, layout: Layout, machine: Machine, part: ModelPart) -> StageCost:
    """Seconds of a stage for one micro-batch, with the traffic that it waits for."""
    model, tokens = work.model, _tokens(work, layout)
    layer_flops = 2 * tokens * (layer_matrices(model) + work.sequence_length * model.hidden_size)
    layer_s = layer_flops / (layout.tensor * machine.flops)
    reduced = tokens * model.hidden_size * machine.element_bytes
    layer_s += 2 * all_reduce_s(reduced, layout.tensor, machine.intra_bandwidth, machine.latency_s)
    lm_head_flops = 6 * tokens * model.vocab_size * model.hidden_size
    lm_head_s = lm_head_flops / (layout.tensor * machine.lm_head_flops)
    backward = 3 if layout.recompute else 2
    trunk, heads = len(part.trunk_layers), len(part.heads)
    gather_s, scatter_s, lm_head_gather_s = 0.0, 0.0, 0.0
    if layout.zero == 3:
        per_layer = layer_matrices(model) / layout.tensor * machine.element_bytes
        gather_s = ring_s(per_layer, layout, machine)
        scatter_s = gather_s
        shared = model.vocab_size * model.hidden_size / layout.tensor * machine.element_bytes
        lm_head_gather_s = ring_s(shared, layout, machine) if part.owns_lm_head else 0.0

    def both(computing: float, traffic: float) -> float:
        return max(computing, traffic) if machine.overlaps else computing + traffic

    return StageCost(
        trunk * both(layer_s, gather_s),
        both(
            heads * ((1 + backward) * layer_s + lm_head_s),
            heads * (2 * gather_s + scatter_s) + lm_head_gather_s,
        ),
        trunk * both(backward * layer_s, gather_s + scatter_s),
    )


def _once_a_step(work: Work, layout: Layout, machine: Machine) -> float:
    """Seconds after the micro-batches, in the slowest stage."""
    model, share = work.model, layout.tensor * layout.data
    seconds = []
    for part in layout.plan:
        parameters = part_parameters(part, model)
        traffic = 0.0
        if layout.zero < 3:
            # Each rank's share of the gradients is reduced to it; then weights are gathered.
            reduced = 4 if layout.data >= FP32_REDUCTION_FROM_RANKS else machine.element_bytes
            sent = parameters / layout.tensor * (reduced + machine.element_bytes)
            traffic = ring_s(sent, layout, machine)
        seconds.append(parameters / share * machine.optimizer_s + traffic)
    unembedding = model.vocab_size * model.hidden_size / layout.tensor
    if sum(1 for part in layout.plan if part.heads) > 1:
        bandwidth = _stage_bandwidth(layout, machine)
        return max(seconds) + unembedding * (4 + machine.element_bytes) / bandwidth
    return max(seconds)


def memory(work: Work, layout: Layout, machine: Machine, stage: int) -> float:
    """Bytes of a rank of a stage, at most."""
    model, part, size = work.model, layout.plan[stage], machine.element_bytes
    parameters = part_parameters(part, model) / layout.tensor
    if layout.zero == 3:
        states = parameters * (size + 4 + 12) / layout.data
        states += min(parameters, LIVE_PARAMETERS) * size
    else:
        states = parameters * (size + 4 + 12 / layout.data)
    buckets = 2 * min(parameters, BUCKET) * size
    micro = MicroBatch(
        tokens=_tokens(work, layout),
        tensor_size=layout.tensor,
        element_bytes=size,
        checkpointing="full" if layout.recompute else "none",
        accumulation=layout.accumulation,
    )
    loss = 0.0
    if part.heads:
        loss = loss_bytes(model, micro, work.chunk_tokens)
        loss += model.vocab_size * model.hidden_size / layout.tensor * (4 + size)
    kept = stage_activation_bytes(layout.plan, stage, model, micro)
    return states + buckets + loss + kept


def layer_matrices(model: ModelConfig) -> float:
    """Matrix elements of a layer."""
    return model.vocab_size * model.hidden_size / model.unembedding_layer_equivalents


def ring_s(num_bytes: float, layout: Layout, machine: Machine) -> float:
    """Seconds to gather, or scatter, so many bytes over the data-parallel ranks.

    A group within a node uses its links; a group over several nodes shares its nodes' networks
    with the other groups there, one for each tensor-parallel rank.

    Example: 8 ranks of a node gather 8 GB at 100 GB/s: each receives 7 GB, 0.07 s.
    """
    ranks = layout.data
    if ranks == 1:
        return 0.0
    bandwidth = machine.intra_bandwidth
    if ranks * layout.tensor > machine.ranks_per_node:
        node = machine.inter_bandwidth * machine.ranks_per_node
        bandwidth = min(bandwidth, node / layout.tensor)
    return (ranks - 1) / ranks * num_bytes / bandwidth + (ranks - 1) * machine.latency_s


def all_reduce_s(num_bytes: float, ranks: int, bandwidth: float, latency_s: float) -> float:
    """Seconds to add up so many bytes over ranks of one node: a scatter and a gather."""
    if ranks == 1:
        return 0.0
    return 2 * ((ranks - 1) / ranks * num_bytes / bandwidth + (ranks - 1) * latency_s)


def step_flops(work: Work, layout: Layout) -> float:
    """Useful floating point operations of a step."""
    samples = layout.data * layout.micro_size * layout.accumulation
    tokens = samples * work.sequence_length
    return work.model.flops_per_token(work.sequence_length) * tokens


def _stage_bandwidth(layout: Layout, machine: Machine) -> float:
    """Between ranks of different stages, which share a node only if the whole run does."""
    one_node = layout.ranks <= machine.ranks_per_node
    return machine.intra_bandwidth if one_node else machine.inter_bandwidth


def _tokens(work: Work, layout: Layout) -> int:
    return layout.micro_size * work.sequence_length
