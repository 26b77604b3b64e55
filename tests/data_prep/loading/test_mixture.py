"""Mixtures of sources: exact shares, counters as arithmetic, changes that lose nothing."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.loading.mixture import BLOCK_SAMPLES, Mixture, MixtureSegment, block_counts

NAMES = ("a", "b", "c", "d")
WEIGHTS = st.lists(st.floats(0, 1), min_size=4, max_size=4).filter(lambda w: sum(w) > 1e-6)


def make_mixture(*segments: tuple[int, dict[str, float]]) -> Mixture:
    """A mixture of the four sources with (first sample, weights) segments."""
    return Mixture(
        NAMES,
        [MixtureSegment(first_sample=first, counts=block_counts(w)) for first, w in segments],
    )


@settings(max_examples=60, deadline=None)
@given(WEIGHTS)
def test_block_counts_follow_the_weights(weights: list[float]) -> None:
    """They add up to a block, are near the exact share, and never 0 for a share above."""
    named = dict(zip(NAMES, weights, strict=True))
    counts = block_counts(named)
    assert sum(counts.values()) == BLOCK_SAMPLES
    for name, weight in named.items():
        exact = weight / sum(weights) * BLOCK_SAMPLES
        assert (counts[name] > 0) == (weight > 0)
        # The largest gives up a sample for each share that was raised to one.
        assert abs(counts[name] - exact) <= 3


def test_documented_counts() -> None:
    """Two thirds and one third of a block."""
    assert block_counts({"a": 2, "b": 1}) == {"a": 43_691, "b": 21_845}


@settings(max_examples=25, deadline=None)
@given(st.lists(WEIGHTS, min_size=1, max_size=4), st.integers(1, 90_000), st.integers(0, 200_000))
def test_counters_continue_over_changes_of_weights(
    segments: list[list[float]], segment_samples: int, sample: int
) -> None:
    """Each source's samples are numbered 0, 1, 2, ... over all segments, and counts are exact."""
    mixture = make_mixture(
        *(
            (index * segment_samples, dict(zip(NAMES, weights, strict=True)))
            for index, weights in enumerate(segments)
        )
    )
    end = max(sample, 2 * BLOCK_SAMPLES)
    sources, indices = mixture.locate(np.arange(end))
    for number, name in enumerate(NAMES):
        given_by_source = indices[sources == number]
        assert np.array_equal(given_by_source, np.arange(len(given_by_source)))
        assert mixture.counts(sample)[name] == int((sources[:sample] == number).sum())


def test_every_stretch_is_mixed_evenly() -> None:
    """In any 100 samples each source is within two of its share."""
    mixture = make_mixture((0, {"a": 0.6, "b": 0.25, "c": 0.15}))
    sources, _ = mixture.locate(np.arange(10**6, 10**6 + 3000))
    for start, (number, share) in itertools.product(
        range(0, 2900, 37), enumerate((0.6, 0.25, 0.15))
    ):
        found = int((sources[start : start + 100] == number).sum())
        assert abs(found - 100 * share) <= 2


def test_any_sample_is_reached_at_once() -> None:
    """Sample 10^12 is located without those before it, and its counters agree with its position."""
    mixture = make_mixture((0, {"a": 3, "b": 1}), (10**9 + 7, {"b": 2, "c": 1}))
    sample = 10**12 + 3
    (source,), (index,) = mixture.locate(np.array([sample]))
    before, after = mixture.counts(sample), mixture.counts(sample + 1)
    assert before[NAMES[source]] == index
    assert {name: after[name] - before[name] for name in NAMES if after[name] != before[name]} == {
        NAMES[source]: 1
    }
    assert before["a"] == pytest.approx(0.75 * 10**9, rel=1e-6)
    assert before["d"] == 0
