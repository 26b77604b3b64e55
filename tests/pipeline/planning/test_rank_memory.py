"""Memory of a rank by the formulas; `benchmarks/plan.py` holds them against counted tensors."""

from dataclasses import replace
from typing import Any

import pytest

from pipeline.planning.layout import Work
from pipeline.planning.rank_memory import RankMemory, rank_memory
from tests.support.planning_cases import MACHINE, layout_of_stages, seven_billion_work


@pytest.fixture
def work() -> Work:
    """The 7B model."""
    return seven_billion_work()


def test_stages_divide_memory_and_keep_micro_batches(work: Work) -> None:
    """States follow the stage's parameters; what is kept, its depth."""
    five = layout_of_stages(work.model, stages=5, accumulation=16)
    of_stages = [rank_memory(work, five, MACHINE, stage).total for stage in range(5)]
    assert max(of_stages) == of_stages[0]
    assert of_stages[4] == min(of_stages)  # heads keep z alone
    # 4 for norms, 4 for attention, the feed-forward layer; 136 bytes for heads and norms.
    token = (8 * 4096 + 3 * 11008) * 2 + 136
    assert work.model.kv_heads == 32
    assert of_stages[1] - of_stages[2] == pytest.approx(7 * token * 4096)
    partitioned = replace(five, zero=3, data=8)
    assert rank_memory(work, partitioned, MACHINE, 1).total < of_stages[1]


def _of(work: Work, **changes: Any) -> RankMemory:
    return rank_memory(work, layout_of_stages(work.model, **changes), MACHINE, 0)


def test_zero_divides_what_its_level_says(work: Work) -> None:
    """2 bytes of weights, 4 of gradients, 12 of states; each divided from its level on."""
    count = work.model.num_parameters()
    expected = {1: (2, 4, 12 / 8), 2: (2, 4 / 8, 12 / 8), 3: (2 / 8, 4 / 8, 12 / 8)}
    for zero, (weights, gradients, optimizer) in expected.items():
        memory = _of(work, data=8, zero=zero)
        assert memory.weights == pytest.approx(weights * count)
        assert memory.gradients == pytest.approx(gradients * count)
        assert memory.optimizer == pytest.approx(optimizer * count)
        assert memory.gathered == (0 if zero < 3 else 2e9)  # 10^9 live parameters


def test_without_zero_bf16_runs_as_level_1(work: Work) -> None:
    """As `optimizer_level` has it."""
    assert _of(work, data=8, zero=0) == _of(work, data=8, zero=1)


def test_a_bucket_is_whole_however_small_the_model(work: Work) -> None:
    """In fp32 where gradients are added up in it, else in what they travel in."""
    assert _of(work).bucket == 4 * work.bucket
    assert _of(work, zero=2).bucket == 2 * work.bucket
    assert _of(work, zero=3).bucket == 2 * work.bucket
    assert _of(work, zero=3, data=64).bucket == 4 * work.bucket
    assert _of(replace(work, fp32_reduction=False), zero=3, data=64).bucket == 2 * work.bucket


def test_a_copy_among_neighbors_costs_2_bytes_over_their_number(work: Work) -> None:
    """As docs/guides/choosing_a_layout.md says."""
    more = _of(work, zero=3, data=64, neighbors=8).total - _of(work, zero=3, data=64).total
    assert more == pytest.approx(2 / 8 * work.model.num_parameters())


def test_a_frozen_trunk_needs_states_of_heads_only(work: Work) -> None:
    """Three of 32 layers are trained."""
    frozen = _of(replace(work, freeze="trunk"), data=8)
    heads = 3 / 4 * work.model.parameter_count().head_layers
    assert frozen.weights == pytest.approx(2 * work.model.num_parameters())
    assert frozen.optimizer == pytest.approx(12 / 8 * heads)
    assert frozen.gradients == pytest.approx(4 * heads)
    assert frozen.lm_head == 0


def test_the_total_is_the_most_of_three_moments(work: Work) -> None:
    """With recomputation and many gradients the end of a backward, else computing."""
    small = _of(work, checkpointing="full", data=8)
    assert small.total == max(small.computing_total, small.reducing_total, small.stepping_total)
    assert small.reducing_total > small.computing_total
    large = _of(work, data=8)
    assert large.total == large.computing_total
