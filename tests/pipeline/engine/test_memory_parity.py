"""Every layout trains the same model with a memory, and its windows give whole gradients.

As `test_parity`, against the joint loss of one process without ZeRO.
"""

from functools import cache

import pytest

from tests.support.engine_cases import TINY_BUCKET, Case
from tests.support.parity_runs import Course, assert_same_course, train_in_ranks

STEPS = 4
CASES = [
    Case(world=2, zero=3, accumulation=2, bucket=TINY_BUCKET, memory="windows"),
    Case(world=2, tensor=2, zero=3, memory="adapters", freeze="all_but_memory"),
]
SLOW_CASES = [
    Case(world=2, zero=1, accumulation=2, bucket=TINY_BUCKET, memory="windows"),
    Case(world=2, tensor=2, zero=3, accumulation=2, memory="windows"),
    Case(memory="windows"),
    Case(world=2, zero=0, accumulation=2, memory="windows"),
    Case(world=2, zero=2, accumulation=2, bucket=TINY_BUCKET, memory="windows"),
    Case(world=2, zero=3, memory="windows", documents=True),
    Case(world=2, zero=3, memory="paper"),
    Case(world=2, zero=1, memory="stage 1"),
    Case(world=2, zero=2, memory="strict_score"),
    Case(world=2, zero=3, memory="whole", checkpointing="selective"),
    Case(world=2, zero=3, accumulation=2, memory="windows", freeze="all_but_memory"),
    Case(world=4, tensor=2, zero=3, accumulation=2, bucket=TINY_BUCKET, memory="windows"),
    Case(world=4, tensor=2, zero=1, memory="paper", documents=True),
    Case(world=2, zero=3, memory="windows", heads="causal"),
    Case(world=2, zero=3, memory="windows", heads="anticausal, two layers"),
    Case(world=2, zero=3, memory="windows", heads="linear, replicated"),
    Case(world=2, zero=1, memory="windows", freeze="trunk"),
    Case(world=2, zero=1, accumulation=2, memory="adapters", freeze="all_but_memory"),
    Case(world=4, tensor=2, zero=2, memory="adapters", freeze="all_but_memory"),
]


def _name(case: Case) -> str:
    return (
        f"{case.memory}-world{case.world}-tp{case.tensor}-zero{case.zero}-acc{case.accumulation}"
        f"{'-documents' * case.documents}-{case.heads}-{case.freeze}"
    )


@cache
def _reference(case: Case) -> Course:
    return train_in_ranks(case, STEPS)


@pytest.mark.parametrize(
    "case",
    [*CASES, *(pytest.param(case, marks=pytest.mark.stress) for case in SLOW_CASES)],
    ids=_name,
)
def test_layout_gives_the_gradients_of_one_process(case: Case) -> None:
    """Head losses, norm and every gradient agree over four steps, and so do the last weights."""
    reference = Case(
        backward="joint",
        memory=case.memory,
        documents=case.documents,
        heads=case.heads,
        freeze=case.freeze,
    )
    assert_same_course(train_in_ranks(case, STEPS), _reference(reference))
