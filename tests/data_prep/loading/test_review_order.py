"""Passes over all sequences and over chosen ones: each exactly once, as a pure function."""

from itertools import pairwise

import numpy as np

from data_prep.loading.mixture import BLOCK_SAMPLES, Mixture, MixtureSegment
from data_prep.loading.order import SampleOrder
from data_prep.loading.review_order import Pass, ReviewOrder
from data_prep.loading.selection import KeptSequences

COUNTS = [70, 30]


def _order(seed: int = 1) -> ReviewOrder:
    passes = [
        Pass(0, 0, 0, 0, 0, 100, False),
        Pass(1, 1, 0, 0, 100, 40, True),
        Pass(2, 1, 1, 0, 140, 40, True),
        Pass(3, 2, 0, 0, 180, 100, False),
    ]
    order = ReviewOrder(passes, 100, COUNTS, "f", seed=seed)
    order.keep(1, KeptSequences.by_loss(np.arange(100, dtype=np.float32), 60))
    return order


def test_each_pass_has_each_of_its_sequences_once() -> None:
    """L3: all in the first and last pass, the kept ones in those between, each in another order."""
    order = _order()
    found = [order.numbers(one.first_sample, one.size).tolist() for one in order.passes]
    assert [sorted(numbers) for numbers in found] == [
        [*range(100)],
        [*range(60, 100)],
        [*range(60, 100)],
        [*range(100)],
    ]
    assert all(a != b for a, b in pairwise(found))


def test_any_range_is_a_part_of_the_same_sequence_of_samples() -> None:
    """Reading 7 at a time, over passes, gives what reading all at once gives."""
    order = _order()
    whole = order.numbers(0, order.end).tolist()
    parts = [order.numbers(s, min(7, order.end - s)).tolist() for s in range(0, order.end, 7)]
    assert [number for part in parts for number in part] == whole
    assert _order(seed=2).numbers(0, order.end).tolist() != whole
    sources, sequences = order.locate(0, order.end)
    assert [s * 70 + n for s, n in zip(sources, sequences, strict=True)] == whole


def test_steps_end_before_a_selection_and_with_the_run_only() -> None:
    """A step goes on into a repetition and into a phase of all, and stops where losses are due."""
    order = _order()
    assert [order.step_end(s, 16) for s in (0, 96, 100, 132, 164, 180, 276)] == [
        *(16, 100, 116, 148, 180, 196, 280)
    ]
    assert order.step_end(172, 16) == 188


def test_passes_of_all_are_the_epochs_of_plain_training() -> None:
    """L2: with nothing left out the run has the permutations of a run without phases."""
    passes = [Pass(n, n, 0, 0, 100 * n, 100, False) for n in range(4)]
    plain = SampleOrder(
        Mixture(["a"], [MixtureSegment(first_sample=0, counts={"a": BLOCK_SAMPLES})]),
        [100],
        ["f"],
        seed=5,
        shuffle=True,
    )
    assert ReviewOrder(passes, 100, [100], "f", seed=5).locate(0, 400) == plain.locate(0, 400)


def test_a_part_of_the_sequences_is_spread_evenly_over_all() -> None:
    """Every fourth of 100 sequences in two sources, each once an epoch."""
    order = ReviewOrder([Pass(0, 0, 0, 0, 0, 25, False)], 25, COUNTS, "f", seed=1)
    found = sorted(zip(*order.locate(0, 25), strict=True))
    assert found == [divmod(n, 70) for n in range(0, 100, 4)]
