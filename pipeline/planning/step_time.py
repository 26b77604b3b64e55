"""Time of an optimizer step in any layout, from a few formulas.

Per stage and micro-batch of T tokens, with tensor-parallel size t and data-parallel size d:

    layer forward      (2 m T + 2 S H T) / (t F)       m matrix elements of a layer; attention
    LM head            6 V H T / (t F')                logits, gradient of z, gradient of weights
    backward           2 x forward, 3 x with recomputation; a head is forward and backward in one
    tensor parallel    2 all-reduces of T H e bytes a layer and direction: 2 (t-1)/t bytes / w
    ZeRO-3             gathers the stage's weights for forward and again for backward, scatters
                       their gradients after it: (d-1)/d P e / t bytes each, in rings of d - 1
                       messages a layer. Where it overlaps with computing, the longer of both
                       counts, else their sum. With a copy among neighbors it gathers from there.
    ZeRO-2             scatters gradients in every micro-batch; a rank waits for that
    transfer           T H e / w to the next stage

`pipeline.stages.costs.step_time` plays the 1F1B schedule through with these times. Then, once a
step: up to ZeRO-1 gradients are reduced, below ZeRO-3 weights gathered, the stages with heads add
up the LM head's gradient and share its values, and the optimizer moves the rank's share.

Not modelled: uneven machines, contention between collectives, launch overheads, padding, the
data loader, validation, checkpoints.

Legend: S sequence, H hidden, V vocabulary, P parameters of a stage, F FLOP/s of a rank, w
bandwidth, e bytes of an element.
"""

from dataclasses import replace

from model.config import ModelConfig
from model.structure.freezing import heads_trained_alone, is_head_trained
from model.structure.part import ModelPart
from pipeline.planning.layout import Layout, Machine, Prediction, Work
from pipeline.planning.parameters import rank_parameters
from pipeline.planning.rank_memory import reduces_in_fp32
from pipeline.stages.costs import StageCost, step_time
from pipeline.stages.plan import depths

_FP32 = 4


def predict_time(work: Work, layout: Layout, machine: Machine) -> Prediction:
    """Time of a step."""
    costs = [micro_batch_cost(work, layout, machine, part) for part in layout.plan]
    sent = transfer_bytes(work, layout, machine)
    transfer = 0.0
    if len(layout.plan) > 1:
        transfer = sent / stage_bandwidth(layout, machine) + machine.latency_s
    pipeline_s = step_time(costs, depths(layout.plan, work.model), layout.accumulation, transfer)
    return Prediction(
        pipeline_s + _once_a_step(work, layout, machine),
        [1 - layout.accumulation * cost.total / pipeline_s for cost in costs],
    )


def micro_batch_cost(work: Work, layout: Layout, machine: Machine, part: ModelPart) -> StageCost:
    """Seconds of a stage for one micro-batch, with the traffic that it waits for."""
    model, tokens = work.model, layout.micro_tokens(work)
    layer_flops = 2 * tokens * (layer_matrices(model) + work.sequence_length * model.hidden_size)
    layer_s = layer_flops / (layout.tensor * machine.flops)
    reduce_s = 2 * all_reduce_s(
        transfer_bytes(work, layout, machine),
        layout.tensor,
        machine.intra_bandwidth,
        machine.latency_s,
    )
    lm_head_flops = 2 * tokens * model.vocab_size * model.hidden_size
    lm_head_s = lm_head_flops / (layout.tensor * machine.lm_head_flops)
    forward = layer_s + reduce_s
    backward = 2 * layer_s + reduce_s + (forward if layout.checkpointing == "full" else 0.0)
    gather_s, scatter_s, lm_head_gather_s = _zero_s(work, layout, machine, part)

    def both(computing: float, traffic: float) -> float:
        hidden = machine.overlaps and layout.zero == 3
        return max(computing, traffic) if hidden else computing + traffic

    trunk, heads = len(part.trunk_layers), len(part.heads)
    # A linear head is a small part of a layer.
    per_head = model.layers_per_head or model.hidden_size**2 / layer_matrices(model)
    layers = heads * per_head
    if work.freeze != "none":  # frozen heads only forward; no gradient of the unembedding
        trained = sum(is_head_trained(head, work.freeze) for head in part.heads)
        trained_layers = trained * per_head
        computing = layers * forward + heads * lm_head_s
        computing += trained_layers * backward + trained * lm_head_s
        traffic = (layers + trained_layers) * gather_s + trained_layers * scatter_s
        traffic += lm_head_gather_s
        return StageCost(trunk * both(forward, gather_s), both(computing, traffic), 0.0)
    if model.chain:  # a head's forward comes twice, first with the trunk's
        again = backward if layout.checkpointing == "full" else forward + backward
        return StageCost(
            (trunk + layers) * both(forward, gather_s),
            0.0,
            trunk * both(backward, gather_s + scatter_s)
            + both(
                layers * again + 3 * heads * lm_head_s,
                layers * (2 * gather_s + scatter_s) + lm_head_gather_s,
            ),
        )
    return StageCost(
        trunk * both(forward, gather_s),
        both(
            layers * (forward + backward) + 3 * heads * lm_head_s,
            layers * (2 * gather_s + scatter_s) + lm_head_gather_s,
        ),
        trunk * both(backward, gather_s + scatter_s),
    )


def _zero_s(
    work: Work, layout: Layout, machine: Machine, part: ModelPart
) -> tuple[float, float, float]:
    """Seconds to gather a layer, to scatter its gradients, and to gather the LM head."""
    if layout.zero < 2:
        return 0.0, 0.0, 0.0
    model, size = work.model, machine.element_bytes
    layer = layer_matrices(model) / layout.tensor
    sent = _FP32 if reduces_in_fp32(work, layout, size) else size
    scatter_s = ring_s(layer * sent, layout, machine)
    if layout.zero == 2:
        return 0.0, scatter_s, 0.0
    near = replace(layout, data=layout.neighbors) if layout.neighbors > 1 else layout
    shared = model.vocab_size * model.hidden_size / layout.tensor * size
    lm_head_s = ring_s(shared, near, machine) if part.owns_lm_head else 0.0
    return ring_s(layer * size, near, machine), scatter_s, lm_head_s


def _once_a_step(work: Work, layout: Layout, machine: Machine) -> float:
    """Seconds after the micro-batches, in the slowest stage."""
    model, size = work.model, machine.element_bytes
    seconds = []
    for part in layout.plan:
        count = rank_parameters(part, model, layout.tensor, freeze=work.freeze)
        traffic = ring_s(once_bytes(count.trained, count.held, work, layout, size), layout, machine)
        seconds.append(count.trained / layout.data * machine.optimizer_s + traffic)
    unembedding = model.vocab_size * model.hidden_size / layout.tensor
    if sum(1 for part in layout.plan if part.heads) > 1:
        shared = unembedding * (_FP32 + size) / stage_bandwidth(layout, machine)
        return max(seconds) + shared
    return max(seconds)


def once_bytes(trained: float, held: float, work: Work, layout: Layout, size: int) -> float:
    """Bytes that a rank's data-parallel group moves in rings once a step.

    Gradients go to the rank that owns them (to all of them without ZERO), weights come back; a copy
    among neighbors is filled.
    """
    reduced = _FP32 if reduces_in_fp32(work, layout, size) else size
    if layout.zero == 0 and size == _FP32:
        return 2 * trained * _FP32
    if layout.zero < 2:
        return trained * (reduced + size)
    if layout.zero == 2:
        return trained * size
    return held * size if layout.neighbors > 1 else 0.0


def layer_matrices(model: ModelConfig) -> float:
    """Matrix elements of a layer."""
    return model.vocab_size * model.hidden_size / model.unembedding_layer_equivalents


def transfer_bytes(work: Work, layout: Layout, machine: Machine) -> float:
    """Bytes of a micro-batch's activations between two layers, T H e."""
    return layout.micro_tokens(work) * work.model.hidden_size * machine.element_bytes


def ring_s(num_bytes: float, layout: Layout, machine: Machine) -> float:
    """Seconds to gather, or scatter, so many bytes over the data-parallel ranks.

    A group within a node uses its links; a group over several nodes shares its nodes' networks
    with the other groups there, one for each tensor-parallel rank.

    Example: 8 ranks of a node gather 8 GB at 100 GB/s: each receives 7 GB, 0.07 s.
    """
    ranks = layout.data
    if ranks == 1 or not num_bytes:
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
    model, alone = work.model, heads_trained_alone(work.model.future_tokens, work.freeze)
    per_token = model.flops_per_token(work.sequence_length, trained_heads=alone)
    return per_token * layout.samples * work.sequence_length


def stage_bandwidth(layout: Layout, machine: Machine) -> float:
    """Between ranks of different stages, which share a node only if the whole run does."""
    one_node = layout.ranks <= machine.ranks_per_node
    return machine.intra_bandwidth if one_node else machine.inter_bandwidth
