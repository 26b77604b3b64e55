"""Pipeline stages train the model that one process trains: gradients, losses, norms and weights.

Every plan of stages with every ZeRO level, accumulation and tensor-parallel size is in `ALL`, which
`make stress` runs; `make test` runs a part of it in which every pair of settings occurs.
"""

from functools import cache
from itertools import product

import pytest

from tests.support.engine_cases import DEFAULT_BUCKET, TINY_BUCKET, Case
from tests.support.long_forms import part_of
from tests.support.parity_runs import Course, assert_same_course, train_in_ranks

STEPS = 5
PLANS = {
    "trunk 0-2|heads 1-3": 2,
    "trunk 0-2|heads 1-2|heads 3": 3,
    "trunk 0|trunk 1-2|heads 1-3": 3,
    "trunk 0|trunk 1-2|heads 1-2|heads 3": 4,
}
MAX_RANKS = 8


def _case(plan: str, zero: int, accumulation: int, tensor: int, bucket: int, kept: str) -> Case:
    """As many data-parallel ranks as fit, but at most two."""
    copy = PLANS[plan] * tensor
    data = min(2, MAX_RANKS // copy)
    return Case(
        world=copy * data,
        tensor=tensor,
        zero=zero,
        accumulation=accumulation,
        bucket=bucket,
        checkpointing=kept,
        stages=plan,
    )


ALL = [
    _case(*settings)
    for settings in product(
        PLANS, (1, 2, 3), (1, 2, 4), (1, 2), (DEFAULT_BUCKET, TINY_BUCKET), ("none", "full")
    )
]
# Rows: every plan with every ZeRO level; the other settings turn so that each pair occurs.
PAIRWISE = [
    _case(
        plan,
        zero,
        (1, 2, 4)[(row + zero) % 3],
        1 + (row + zero) % 2,
        (DEFAULT_BUCKET, TINY_BUCKET)[(row // 2 + zero) % 2],
        ("none", "full")[(row + zero // 2) % 2],
    )
    for row, plan in enumerate(PLANS)
    for zero in (1, 2, 3)
]
OTHERS = [
    Case(world=3, accumulation=4, stages="trunk 0-2|heads 1|heads 2-3"),  # without ZeRO
    Case(world=4, zero=2, accumulation=2, stages="trunk 0-1|trunk 2+heads 1-3"),
    Case(world=3, zero=3, accumulation=4, stages="trunk 0|trunk 1-2+heads 1-2|heads 3"),
    Case(world=6, zero=1, accumulation=4, stages="trunk 0-2|heads 1|heads 2-3"),
    Case(world=4, zero=3, accumulation=2, checkpointing="selective", stages="trunk 0-2|heads 1-3"),
    Case(world=4, zero=2, accumulation=2, documents=True, stages="trunk 0-2|heads 1-3"),
]


def _name(case: Case) -> str:
    bucket = "tiny" if case.bucket == TINY_BUCKET else "default"
    documents = "-documents" if case.documents else ""
    return (
        f"{case.stages}-world{case.world}-tp{case.tensor}-zero{case.zero}-acc{case.accumulation}"
        f"-{bucket}-{case.checkpointing}{documents}"
    )


@cache
def _reference(documents: bool) -> Course:
    return train_in_ranks(Case(backward="joint", documents=documents), STEPS)


@pytest.mark.parametrize(
    "case", part_of([*PAIRWISE, *OTHERS], lambda number, _: number % 3 == 0), ids=_name
)
def test_stages_train_as_one_process(case: Case) -> None:
    """Losses, norms and every gradient over five steps, and the weights after them, agree."""
    assert_same_course(train_in_ranks(case, STEPS), _reference(case.documents))


@pytest.mark.stress
@pytest.mark.parametrize("case", [case for case in ALL if case not in PAIRWISE], ids=_name)
def test_every_combination_of_stages_trains_as_one_process(case: Case) -> None:
    """The same for the rest of the matrix."""
    assert_same_course(train_in_ranks(case, STEPS), _reference(case.documents))
