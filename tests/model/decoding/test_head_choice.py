"""The number of heads that pays, from measured agreement and measured costs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from model.decoding.head_choice import (
    Drafting,
    HeadChoice,
    automatic_heads,
    best_drafting,
    best_heads,
    choose_heads,
    forward_seconds,
    forward_seconds_of,
)
from model.errors import CheckpointError
from model.hugging_face.acceptance import ACCEPTANCE_NAME, Acceptance, read_acceptance
from tests.support.tiny_model import tiny_config, tiny_network


def test_expected_tokens_per_second_decide() -> None:
    """A head pays if it promises more tokens than its time costs, and clearly more."""
    often = Acceptance(agreed=(100, 80, 60, 5))
    assert [often.tokens_per_forward(k) for k in (1, 2, 3, 4)] == [1.0, 1.8, 2.4, 2.45]
    assert best_heads(often, [1.0, 1.0, 1.0, 1.0]) == 3  # 2.45 is less than 3 % above 2.4
    assert best_heads(often, [1.0, 1.2, 1.9, 2.9]) == 2
    assert best_heads(often, [1.0, 1.8, 2.4, 2.5]) == 1
    assert best_heads(often, [1.0, 1.9, 2.0, 9.0]) == 3
    assert best_heads(Acceptance(agreed=(100, 0, 0)), [1.0, 1.0, 1.0]) == 1
    # Where a quarter of what drafts add counts, forwards have to cost no more than that.
    assert best_heads(often, [1.0, 1.2, 1.9, 2.9], 0.25) == 1
    assert best_heads(often, [1.0, 1.1, 1.2, 1.3], 0.25) == 3
    assert best_heads(Acceptance(agreed=(7,)), [1.0]) == 1


def test_a_tree_is_taken_where_it_pays() -> None:
    """Only trees that could pay are measured, the most promising first."""
    known = Acceptance(agreed=(100, 50, 30), within=((100, 80, 60), (100, 85, 70)))
    assert known.tokens_per_forward(3, 1) == 2.4
    asked: list[Drafting] = []

    def measure(seconds: float) -> Callable[[Drafting], float]:
        def of(way: Drafting) -> float:
            asked.append(way)
            return seconds

        return of

    costs = [1.0, 1.1, 1.2]
    # After 2.55 / 1.4 the other could still be more, at 2.4 / 1.2.
    assert best_drafting(known, costs, measure(1.4)) == Drafting(3, 2)
    assert asked == [Drafting(3, 2), Drafting(3, 1)]
    assert best_drafting(known, costs, measure(9.0)) == Drafting(3, 0)
    asked.clear()
    few = Acceptance(agreed=(100, 1, 0), within=((100, 2, 0), (100, 3, 0)))
    assert best_drafting(few, [1.0, 1.5, 2.0], measure(1.0)) == Drafting(1, 0)
    assert asked == []
    old = Acceptance(agreed=(100, 50, 30))  # of an export before trees were counted
    assert best_drafting(old, costs, measure(0.1)) == Drafting(3, 0)
    assert min(forward_seconds_of(tiny_network(tiny_config()), 2, [Drafting(3, 1)])) > 0


def test_a_batch_takes_the_heads_of_its_size() -> None:
    """The first measured size that is not smaller than itself, or the last."""
    choice = HeadChoice({1: 4, 4: 2, 16: 1})
    assert [choice.of(rows) for rows in (1, 2, 4, 5, 16, 99)] == [4, 2, 2, 1, 1, 1]
    assert choice.most == 4
    assert choice.told() == "4 up to 1, 2 up to 4, 1 up to 16 texts"
    assert HeadChoice({1: 1, 4: 1}).told() == "1 head"


def test_costs_are_measured_for_every_number_of_heads() -> None:
    """Of a real model; what is chosen follows from what is known of its heads."""
    network = tiny_network(tiny_config())
    seconds = forward_seconds(network, 3, 4)
    assert len(seconds) == 4
    assert min(seconds) > 0
    assert seconds == sorted(seconds)
    never = choose_heads(network, Acceptance(agreed=(50, 0, 0, 0)), [1, 4], joined=True)
    assert never.heads == {1: 1, 4: 1}


def test_without_figures_all_heads_are_taken_with_a_note(tmp_path: Path) -> None:
    """As of an export of an earlier version; damaged figures are refused."""
    network, notes = tiny_network(tiny_config()), list[str]()
    choice = automatic_heads(tmp_path, network, [1, 8], notes.append)
    assert choice.heads == {1: 4, 8: 4}
    assert len(notes) == 1
    assert "has no acceptance.json, so --heads auto takes all 4 heads" in notes[0]
    for agreed in ([5, 6], [0, 0], [], [-1]):
        (tmp_path / ACCEPTANCE_NAME).write_text(json.dumps({"agreed": agreed}))
        with pytest.raises(CheckpointError, match=r"acceptance\.json is damaged .*; export again"):
            read_acceptance(tmp_path)
