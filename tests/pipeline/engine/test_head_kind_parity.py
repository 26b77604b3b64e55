"""Every kind of head trains the same model in every layout.

The reference is the joint loss of one process, which `tests/model/test_head_kinds.py` compares with
plain autograd over whole logits.
"""

from dataclasses import replace
from functools import cache

import pytest

from tests.support.engine_cases import TINY_BUCKET, Case
from tests.support.head_variants import VARIANTS
from tests.support.parity_runs import Course, assert_same_course, train_in_ranks

STEPS = 3
EPS = 1e-4
SINGLE_STAGE = [
    Case(world=1, zero=1),
    Case(world=2, zero=0, accumulation=2),
    Case(world=2, zero=2, accumulation=2, bucket=TINY_BUCKET, checkpointing="full"),
    Case(world=2, zero=3, accumulation=2, documents=True),
    Case(world=2, zero=3, checkpointing="full", bucket=TINY_BUCKET),
    Case(world=2, tensor=2, zero=1, accumulation=2, checkpointing="selective"),
    Case(world=4, tensor=2, zero=3, accumulation=2, bucket=TINY_BUCKET),
]
# Of anticausal heads the last ones come first; linear ones stay together.
STAGES = {
    "parallel": ("trunk 0-2|heads 1|heads 2-3", "trunk 0-1|trunk 2+heads 1|heads 2-3"),
    "anticausal": ("trunk 0-2|heads 3|heads 1-2", "trunk 0-1|trunk 2+heads 3|heads 1-2"),
    "linear": ("trunk 0|trunk 1-2|heads 1-3", "trunk 0|trunk 1|trunk 2+heads 1-3"),
}


def _staged(heads: str) -> list[Case]:
    kind = VARIANTS[heads].get("head_kind", "parallel")
    apart, mixed = STAGES.get(kind, STAGES["parallel"])
    return [
        Case(world=3, zero=1, accumulation=4, stages=apart),
        Case(world=3, zero=3, accumulation=2, stages=mixed, checkpointing="full"),
        Case(world=6, zero=2, accumulation=2, stages=mixed, documents=True, bucket=TINY_BUCKET),
        Case(world=6, zero=3, accumulation=4, stages=apart),
        Case(world=6, tensor=2, zero=3, accumulation=2, stages=apart),
    ]


FROZEN = [
    Case(world=2, zero=3, accumulation=2, freeze="trunk"),
    Case(world=2, tensor=2, zero=1, freeze="trunk", checkpointing="full"),
]
ALL = [
    replace(case, heads=heads, eps=EPS)
    for heads in VARIANTS
    if heads != "parallel"  # in tests/pipeline/engine/test_parity.py and test_stage_parity.py
    for case in (
        *SINGLE_STAGE,
        *_staged(heads),
        *(FROZEN if VARIANTS[heads].get("head_kind") != "anticausal" else ()),
    )
]
# In `make test` each kind once under ZeRO-3, split, and in stages; the rest in `make stress`.
FAST = [
    *(
        replace(SINGLE_STAGE[3], eps=EPS, heads=heads)
        for heads in ("causal", "anticausal", "linear")
    ),
    replace(SINGLE_STAGE[2], eps=EPS, heads="two layers"),
    replace(SINGLE_STAGE[4], eps=EPS, heads="replicated"),
    *(
        replace(SINGLE_STAGE[5], eps=EPS, heads=heads)
        for heads in ("linear, replicated", "anticausal")
    ),
    replace(_staged("causal")[1], eps=EPS, heads="causal, two layers, replicated"),
    replace(_staged("anticausal")[0], eps=EPS, heads="anticausal"),
    replace(_staged("replicated")[0], eps=EPS, heads="replicated"),
    replace(_staged("linear")[1], eps=EPS, heads="linear"),
    replace(FROZEN[0], eps=EPS, heads="causal, two layers, replicated"),
]


def _name(case: Case) -> str:
    return (
        f"{case.heads}-world{case.world}-tp{case.tensor}-zero{case.zero}-acc{case.accumulation}"
        f"-{case.checkpointing}-{case.stages}{'-documents' * case.documents}"
        + ("" if case.freeze == "none" else "-frozen")
    )


@cache
def _reference(heads: str, documents: bool, freeze: str) -> Course:
    case = Case(backward="joint", heads=heads, documents=documents, freeze=freeze, eps=EPS)
    return train_in_ranks(case, STEPS)


@pytest.mark.parametrize(
    "case",
    [
        *FAST,
        *(pytest.param(case, marks=pytest.mark.stress) for case in ALL if case not in FAST),
    ],
    ids=_name,
)
def test_layout_gives_the_gradients_of_one_process(case: Case) -> None:
    """Losses, norm, every gradient of every step and the last weights agree."""
    expected = _reference(case.heads, case.documents, case.freeze)
    assert_same_course(train_in_ranks(case, STEPS), expected)
