"""No plan of stages hangs under CUDA's rules of waiting, and those that hung before are found.

Each mend is undone in turn: the simulation must then hang, or it would prove nothing.
"""

from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any

import pytest

from model.structure.part import ModelPart
from tests.support.stream_waits import HEADS, SyncAt, hangs, record

TRUNK = 6


def _plans() -> list[tuple[ModelPart, ...]]:
    """Two to five stages: trunk alone, trunk with heads, heads over one to three stages."""
    plans = []
    for trunk_stages, head_stages, mixed in product((1, 2, 3), (1, 2, 3), (False, True)):
        cuts = [TRUNK * n // trunk_stages for n in range(trunk_stages + 1)]
        trunk = [range(a, b) for a, b in pairwise(cuts)]
        cuts = [HEADS * n // head_stages for n in range(head_stages + 1)]
        heads = [range(a + 1, b + 1) for a, b in pairwise(cuts)]
        parts = [ModelPart(layers, range(0)) for layers in trunk]
        parts += [ModelPart(range(0), numbers) for numbers in heads]
        if mixed:  # the last trunk stage and the first heads share a stage
            parts[trunk_stages - 1 : trunk_stages + 1] = [ModelPart(trunk[-1], heads[0])]
        if len(parts) > 1:
            plans.append(tuple(parts))
    return plans


def _hanging(
    micro_batches: Sequence[int],
    sync_at: SyncAt = "never",
    one_queue: bool = False,
    chain: bool = False,
    first_alone: bool = True,
) -> tuple[int, int]:
    """How many of all plans and micro-batch counts hang, and how many there are."""
    cases = list(product(_plans(), micro_batches))
    options: Any = {"sync_at": sync_at, "one_queue": one_queue, "chain": chain}
    options["first_alone"] = first_alone
    hanging = [
        hangs([record(plan, stage, count, **options) for stage in range(len(plan))])
        for plan, count in cases
    ]
    return sum(hanging), len(cases)


@pytest.mark.parametrize("chain", [False, True])
def test_no_plan_hangs(chain: bool) -> None:
    """From one micro-batch to more than fill the longest chain, whatever heads read."""
    assert _hanging((1, 2, 3, 4, 6, 9), chain=chain)[0] == 0


@pytest.mark.parametrize("chain", [False, True])
def test_first_launches_may_wait_for_the_device(chain: bool) -> None:
    """Of kernels that are loaded or made then: the first micro-batch passes alone."""
    assert _hanging((1, 2, 3, 4, 6, 9), sync_at="first launch", chain=chain)[0] == 0
    hanging, cases = _hanging((2, 4), sync_at="first launch", chain=chain, first_alone=False)
    assert hanging > cases // 2


@pytest.mark.parametrize("sync_at", ["forward", "backward"])
def test_a_device_wide_wait_inside_a_step_would_hang(sync_at: SyncAt) -> None:
    """DeepSpeed's throughput timer in each forward; ZeRO-2's overlap in each backward."""
    hanging, cases = _hanging((1, 2, 4, 8), sync_at=sync_at)
    assert hanging > cases // 2


def test_one_queue_for_all_transfers_of_a_group_would_hang() -> None:
    """What a `device_id` for the process group brings: all pairs of a chain on one communicator."""
    assert _hanging((2, 4, 8), one_queue=True)[0] > 0
