"""Time of a step by the formulas: what it computes, what it sends, how long stages wait."""

from dataclasses import replace

import pytest

from model.structure.part import ModelPart
from pipeline.planning.layout import Checkpointing, Work
from pipeline.planning.step_time import (
    all_reduce_s,
    layer_matrices,
    micro_batch_cost,
    once_bytes,
    predict_time,
    ring_s,
    step_flops,
)
from pipeline.stages.costs import predicted_idle, stage_costs
from pipeline.stages.plan import depths
from tests.support.planning_cases import MACHINE, layout_of_stages, seven_billion_work


@pytest.fixture
def work() -> Work:
    """The 7B model."""
    return seven_billion_work()


def test_one_rank_computes_and_does_nothing_else(work: Work) -> None:
    """A step takes its floating point operations over the rank's rate, exactly."""
    layout = layout_of_stages(work.model)
    assert predict_time(work, layout, MACHINE).step_s == pytest.approx(
        step_flops(work, layout) / 1e14
    )
    again = replace(layout, checkpointing="full")
    layers = step_flops(work, layout) - 4 * 6 * 4096 * 4 * work.model.vocab_size * 4096
    assert predict_time(work, again, MACHINE).step_s == pytest.approx(
        (step_flops(work, layout) + layers / 3) / 1e14
    )


def test_traffic_has_the_volume_of_rings(work: Work) -> None:
    """7 of 8 parts arrive in a gather, twice that in an all-reduce; between nodes, slower."""
    layout = layout_of_stages(work.model, data=8)
    assert ring_s(8e9, layout, MACHINE) == pytest.approx(0.07)
    assert all_reduce_s(8e9, 8, 1e11, 0.0) == pytest.approx(0.14)
    two_nodes = replace(layout, data=16)  # one group has all 8 links of a node, 80 GB/s
    assert ring_s(8e9, two_nodes, MACHINE) == pytest.approx(15 / 16 * 0.1)
    shared = replace(layout, data=16, tensor=8)  # 8 groups have one link each
    assert ring_s(8e9, shared, MACHINE) == pytest.approx(15 / 16 * 0.8)
    slow = replace(MACHINE, latency_s=1e-3)
    assert ring_s(8e9, layout, slow) == pytest.approx(0.07 + 7e-3)


def test_zero_3_gathers_twice_and_scatters_once(work: Work) -> None:
    """Per layer and micro-batch; hidden behind computing where that overlaps and is longer."""
    part = ModelPart(range(1, 8), range(0))
    plain = layout_of_stages(work.model, data=8)
    partitioned = replace(plain, zero=3)
    extra = [
        ours - theirs
        for ours, theirs in zip(
            micro_batch_cost(work, partitioned, MACHINE, part),
            micro_batch_cost(work, plain, MACHINE, part),
            strict=True,
        )
    ]
    gather = 7 * 7 / 8 * layer_matrices(work.model) * 2 / 1e11
    assert extra == pytest.approx([gather, 0.0, 2 * gather])
    overlapping = replace(MACHINE, overlaps=True)
    assert micro_batch_cost(work, partitioned, overlapping, part) == micro_batch_cost(
        work, plain, overlapping, part
    )


def test_bubbles_are_those_of_the_stage_plan(work: Work) -> None:
    """Without traffic the idle shares are what the dry run predicts, but for attention."""
    layout = layout_of_stages(work.model, stages=5, accumulation=16)
    free = replace(MACHINE, intra_bandwidth=float("inf"))
    costs = stage_costs(layout.plan, work.model, recompute=False)
    expected = predicted_idle(costs, depths(layout.plan, work.model), 16)
    assert predict_time(work, layout, free).idle == pytest.approx(expected, abs=0.04)


def test_tensor_parallel_ranks_reduce_twice_a_layer_and_direction(work: Work) -> None:
    """Attention and feed-forward forward, and the same backward; recomputing repeats forward."""
    part = ModelPart(range(1, 8), range(0))
    layout = layout_of_stages(work.model, tensor=8)
    free = replace(MACHINE, intra_bandwidth=float("inf"))
    reduce_s = 7 * 2 * all_reduce_s(4096 * 4096 * 2, 8, 1e11, 0.0)
    cases: tuple[tuple[Checkpointing, int], ...] = (("none", 1), ("full", 2))
    for checkpointing, backward in cases:
        again = replace(layout, checkpointing=checkpointing)
        ours = micro_batch_cost(work, again, MACHINE, part)
        theirs = micro_batch_cost(work, again, free, part)
        assert ours.forward - theirs.forward == pytest.approx(reduce_s)
        assert ours.backward - theirs.backward == pytest.approx(backward * reduce_s)


def test_zero_2_scatters_in_every_micro_batch_and_waits(work: Work) -> None:
    """Whether traffic overlaps or not, and in fp32 where many ranks add up."""
    part = ModelPart(range(1, 8), range(0))
    layout = layout_of_stages(work.model, data=8, zero=2)
    overlapping = replace(MACHINE, overlaps=True)
    alone = micro_batch_cost(work, replace(layout, zero=1), MACHINE, part)
    for machine in (MACHINE, overlapping):
        waited = micro_batch_cost(work, layout, machine, part).backward - alone.backward
        assert waited == pytest.approx(7 * 7 / 8 * layer_matrices(work.model) * 2 / 1e11)
    summed = replace(work, fp32_reduction=True)
    waited = micro_batch_cost(summed, layout, MACHINE, part).backward - alone.backward
    assert waited == pytest.approx(7 * 7 / 8 * layer_matrices(work.model) * 4 / 1e11)


def test_a_copy_among_neighbors_keeps_gathers_in_the_node(work: Work) -> None:
    """Gathers take the node's links; over the network goes the copy's filling, once a step."""
    part = ModelPart.whole(work.model)
    layout = layout_of_stages(work.model, data=64, zero=3)
    near = replace(layout, neighbors=8)
    slower = micro_batch_cost(work, layout, MACHINE, part)
    faster = micro_batch_cost(work, near, MACHINE, part)
    gather_s = 7 / 8 * layer_matrices(work.model) * 2 / 1e11
    computing = micro_batch_cost(work, replace(layout, zero=1), MACHINE, part)
    assert faster.forward - computing.forward == pytest.approx(28 * gather_s)
    assert faster.forward < slower.forward
    held = work.model.num_parameters()
    assert once_bytes(held, held, work, layout, 2) == 0
    assert once_bytes(held, held, work, near, 2) == 2 * held


def test_a_frozen_trunk_has_no_backward(work: Work) -> None:
    """Its layers run forward; the heads beyond the first both ways: as the FLOP count has it."""
    frozen = replace(work, freeze="trunk")
    layout = layout_of_stages(work.model)
    assert predict_time(frozen, layout, MACHINE).step_s == pytest.approx(
        step_flops(frozen, layout) / 1e14
    )
