"""Which sequences stay: exactly the hardest, whatever the ties, found again by their ranks."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from data_prep.loading import selection
from data_prep.loading.selection import KeptSequences

Losses = NDArray[np.float32]
CASES: dict[str, Callable[[np.random.Generator], Losses]] = {
    "distinct": lambda g: g.permutation(1000).astype(np.float32),
    "ties": lambda g: g.integers(0, 5, 1003).astype(np.float32),
    "one value": lambda g: np.full(517, 2.5, np.float32),
    "not finite": lambda g: np.where(
        g.random(900) < 0.2, g.choice([np.nan, np.inf], 900), g.random(900)
    ).astype(np.float32),
}


def _numbers(kept: KeptSequences) -> NDArray[np.int64]:
    return kept(np.arange(kept.count))


@pytest.mark.parametrize("losses", CASES.values(), ids=CASES)
@pytest.mark.parametrize("percent", [0, 1, 50, 70, 99])
def test_those_of_the_lowest_loss_go_and_ties_by_number(
    losses: Callable[[np.random.Generator], Losses], percent: int
) -> None:
    """L1: what stays and what goes are all, and the order by (loss, number) divides them."""
    values = losses(np.random.default_rng(3))
    dropped = len(values) * percent // 100
    kept = KeptSequences.by_loss(values, dropped)
    # nan and inf are alike, and the highest
    order = np.lexsort((np.arange(len(values)), np.where(np.isnan(values), np.inf, values)))
    assert kept.count == len(values) - dropped
    np.testing.assert_array_equal(_numbers(kept), np.sort(order[dropped:]))


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same from chunks of 512 sequences as from one; ties are spent in order over them."""
    values = np.random.default_rng(4).integers(0, 3, 5000).astype(np.float32)
    whole = KeptSequences.by_loss(values, 2200)
    monkeypatch.setattr(selection, "_CHUNK", 512)
    parts = KeptSequences.by_loss(values, 2200)
    np.testing.assert_array_equal(whole.bits, parts.bits)
    np.testing.assert_array_equal(_numbers(whole), _numbers(parts))


def test_losses_are_left_as_they_are() -> None:
    """Selection works on a copy; the array is what a checkpoint holds."""
    values = np.array([3, np.nan, 1, 2], np.float32)
    before = values.copy()
    assert _numbers(KeptSequences.by_loss(values, 2)).tolist() == [0, 1]
    np.testing.assert_array_equal(values, before)
