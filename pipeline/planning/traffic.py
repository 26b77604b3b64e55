"""What a rank receives in a step, by purpose and link."""

from typing import NamedTuple

from pipeline.planning.layout import Layout, Machine, Work
from pipeline.planning.parameters import RankParameters, rank_parameters
from pipeline.planning.rank_memory import reduces_in_fp32
from pipeline.planning.step_time import once_bytes, transfer_bytes

_FP32 = 4


class Traffic(NamedTuple):
    """One purpose.

    Attributes:
        what: in words.
        within_node: whether the slowest link that it takes is one within a node.
        received: bytes of a rank and step.
    """

    what: str
    within_node: bool
    received: float


def rank_traffic(work: Work, layout: Layout, machine: Machine, stage: int) -> list[Traffic]:
    """What a rank of a stage receives, without what is nothing."""
    count = rank_parameters(layout.plan[stage], work.model, layout.tensor, freeze=work.freeze)
    found = [
        *_of_zero(count, work, layout, machine),
        _of_tensor_parallel(work, layout, machine, stage),
        *_of_stages(count, work, layout, machine, stage),
    ]
    return [traffic for traffic in found if traffic.received]


def _of_zero(count: RankParameters, work: Work, layout: Layout, machine: Machine) -> list[Traffic]:
    size, micro_batches = machine.element_bytes, layout.accumulation
    share = (layout.data - 1) / layout.data
    near = layout.data * layout.tensor <= machine.ranks_per_node
    sent = _FP32 if reduces_in_fp32(work, layout, size) else size
    once = once_bytes(count.trained, count.held, work, layout, size)
    found = [Traffic("gradients and weights, once a step", near, share * once)]
    if layout.zero >= 2:
        scattered = micro_batches * share * count.trained * sent
        found.append(Traffic("gradients of every micro-batch", near, scattered))
    if layout.zero == 3:
        gathers = (2 if work.freeze == "none" else 1) * micro_batches
        if layout.neighbors > 1:
            share = (layout.neighbors - 1) / layout.neighbors
            near = layout.neighbors * layout.tensor <= machine.ranks_per_node
        received = gathers * share * count.held * size
        found.append(Traffic("weights for every forward and backward", near, received))
    return found


def _of_tensor_parallel(work: Work, layout: Layout, machine: Machine, stage: int) -> Traffic:
    part = layout.plan[stage]
    directions = 3 if layout.checkpointing == "full" else 2
    layers = len(part.trunk_layers) + len(part.heads)
    reduced = 2 * directions * layers * layout.accumulation * transfer_bytes(work, layout, machine)
    share = 2 * (layout.tensor - 1) / layout.tensor
    near = layout.tensor <= machine.ranks_per_node
    return Traffic("activations among tensor-parallel ranks", near, share * reduced)


def _of_stages(
    count: RankParameters, work: Work, layout: Layout, machine: Machine, stage: int
) -> list[Traffic]:
    near = layout.ranks <= machine.ranks_per_node
    neighbors = (stage > 0) + (stage < len(layout.plan) - 1)
    passed = neighbors * layout.accumulation * transfer_bytes(work, layout, machine)
    found = [Traffic("activations and gradients between stages", near, passed)]
    if sum(1 for part in layout.plan if part.heads) > 1 and count.lm_head:
        shared = count.lm_head * (machine.element_bytes if count.copied else _FP32)
        found.append(Traffic("the LM head among stages with heads", near, shared))
    return found
