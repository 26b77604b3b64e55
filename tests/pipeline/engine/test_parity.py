"""Every layout trains the same model: gradients, losses and norms against one process.

Each case is compared with the joint loss of one process without ZeRO over four optimizer steps;
one step would not show gradients that leak into the next one. The second step leaves some targets
of head 2 out, unevenly over the ranks, so that a normalization by local counts would show. Cases
with masked documents, whose rows lack targets of every head, have a reference of their own.
"""

from dataclasses import replace
from functools import cache

import pytest

from tests.support.engine_cases import DEFAULT_BUCKET, TINY_BUCKET, Case
from tests.support.parity_runs import Course, assert_same_course, train_in_ranks

STEPS = 4


REFERENCE = Case(backward="joint")
ZERO_CASES = [
    Case(world=data, zero=zero, accumulation=accumulation, bucket=bucket)
    for zero in (0, 1, 2, 3)
    for data, accumulation in ((1, 1), (2, 2))
    for bucket in (DEFAULT_BUCKET, TINY_BUCKET)
    if zero or bucket == DEFAULT_BUCKET
]
TENSOR_CASES = [
    Case(world=2, tensor=2, zero=zero, accumulation=accumulation, bucket=bucket)
    for zero, accumulation, bucket in (
        (0, 2, DEFAULT_BUCKET),
        (1, 1, TINY_BUCKET),
        (2, 2, TINY_BUCKET),
        (3, 1, DEFAULT_BUCKET),
        (3, 2, TINY_BUCKET),
    )
] + [Case(world=4, tensor=2, zero=3, accumulation=2, bucket=TINY_BUCKET)]
OTHER_CASES = [
    Case(world=2, zero=3, backward="joint"),
    Case(world=2, zero=0, accumulation=2, backward="joint"),
    Case(world=2, zero=2, accumulation=2, backward="joint", bucket=TINY_BUCKET),
    Case(world=2, zero=3, accumulation=2, checkpointing="full", bucket=TINY_BUCKET),
    Case(world=2, zero=3, checkpointing="selective"),
    Case(world=2, tensor=2, zero=1, accumulation=2, checkpointing="full"),
]
DOCUMENT_CASES = [
    Case(documents=True),
    Case(world=2, zero=1, documents=True),
    Case(world=2, zero=2, accumulation=2, documents=True, backward="joint", bucket=TINY_BUCKET),
    Case(world=2, zero=3, documents=True, checkpointing="full"),
    Case(world=2, tensor=2, documents=True, checkpointing="selective"),
    Case(world=4, tensor=2, zero=3, accumulation=2, documents=True, bucket=TINY_BUCKET),
]

FROZEN_CASES = [
    Case(world=world, tensor=tensor, zero=zero, accumulation=acc, freeze="trunk", **changes)
    for world, tensor, zero, acc, changes in (
        (2, 1, 0, 2, {"backward": "joint"}),
        (2, 1, 1, 2, {"bucket": TINY_BUCKET}),
        (2, 2, 2, 2, {"bucket": TINY_BUCKET}),
        (2, 1, 3, 2, {"checkpointing": "full"}),
        (2, 2, 3, 1, {"backward": "joint", "checkpointing": "full"}),
        (4, 2, 3, 2, {"bucket": TINY_BUCKET}),
    )
]

# Weights gathered from a copy among neighbors, of all data-parallel ranks and of some of them.
NEIGHBOR_CASES = [
    Case(world=2, zero=3, accumulation=2, neighbors=2),
    Case(world=2, zero=3, accumulation=2, neighbors=2, checkpointing="full", freeze="trunk"),
    Case(world=4, zero=3, accumulation=2, neighbors=2, bucket=TINY_BUCKET),
    Case(world=8, tensor=2, zero=3, neighbors=2),
]

COMPILED_CASES = [
    Case(world=2, zero=3, accumulation=2, compiled=True, checkpointing="full"),
    Case(world=2, tensor=2, zero=1, accumulation=2, compiled=True),
]


def _name(case: Case) -> str:
    bucket = "tiny" if case.bucket == TINY_BUCKET else "default"
    return (
        f"world{case.world}-tp{case.tensor}-zero{case.zero}-acc{case.accumulation}-{bucket}"
        f"-{case.backward}-{case.checkpointing}{'-documents' * case.documents}"
        + ("" if case.freeze == "none" else "-frozen")
        + ("" if case.neighbors == 1 else f"-neighbors{case.neighbors}")
        + "-compiled" * case.compiled
    )


@cache
def _reference(documents: bool, freeze: str) -> Course:
    reference = replace(REFERENCE, documents=documents, freeze=freeze)
    return train_in_ranks(reference, STEPS)


# Four ranks once in `make test`; masked documents and frozen trunks on four in `make stress`. So
# are tiny buckets of one rank, and cases of ZeRO-3 each pair of whose settings another case has.
COVERED_CASES = [
    Case(world=2, zero=3, accumulation=2),
    Case(world=2, tensor=2, zero=3, accumulation=2, bucket=TINY_BUCKET),
    Case(world=2, zero=3, accumulation=2, bucket=TINY_BUCKET),
    Case(world=2, zero=3, accumulation=2, checkpointing="full", freeze="trunk"),
]
SLOW_CASES = [case for case in DOCUMENT_CASES + FROZEN_CASES + NEIGHBOR_CASES if case.world >= 4]
SLOW_CASES += COMPILED_CASES + COVERED_CASES
SLOW_CASES += [case for case in ZERO_CASES if case.world == 1 and case.bucket == TINY_BUCKET]
CASES = [
    case
    for case in (
        ZERO_CASES + TENSOR_CASES + OTHER_CASES + DOCUMENT_CASES + FROZEN_CASES + NEIGHBOR_CASES
    )
    if case not in SLOW_CASES
]


@pytest.mark.parametrize(
    "case",
    [*CASES, *(pytest.param(case, marks=pytest.mark.stress) for case in SLOW_CASES)],
    ids=_name,
)
def test_layout_gives_the_gradients_of_one_process(case: Case) -> None:
    """Head losses, norm and every gradient agree over four steps, and so do the last weights."""
    assert_same_course(train_in_ranks(case, STEPS), _reference(case.documents, case.freeze))
