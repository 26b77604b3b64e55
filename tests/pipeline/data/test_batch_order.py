"""Ranges of batches that are jumped over, from any position."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.batch_order import BatchPosition, batch_positions

SIZE = 8


def places(behind: int, skip: list[tuple[int, int]], count: int) -> list[BatchPosition]:
    """The next batches after `behind` batches of 8 samples."""
    found = batch_positions(
        batches_behind=behind, next_sample=behind * SIZE, batch_samples=SIZE, skip=skip
    )
    return list(itertools.islice(found, count))


def test_the_documented_example() -> None:
    """Three batches behind, 5 and 6 to skip: 4, 7, 8."""
    assert places(3, [(5, 6)], 3) == [
        BatchPosition(4, 24, 0),
        BatchPosition(7, 48, 2),
        BatchPosition(8, 56, 0),
    ]


@pytest.mark.parametrize("behind", [5, 6, 7, 9, 10])
def test_a_position_within_a_range_goes_to_its_end(behind: int) -> None:
    """From within a range, or from between ranges that touch, the next batch is the one after."""
    (place,) = places(behind, [(9, 10), (6, 8)], 1)
    assert place == BatchPosition(11, 80, 10 - behind)


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(1, 30)), st.integers(0, 12))
def test_any_stop_and_resume_gives_the_same_batches(skipped: set[int], stop: int) -> None:
    """Exactly the other batches come, each once, and resuming after any step changes nothing."""
    ranges = [(batch, batch) for batch in sorted(skipped, reverse=True)]
    straight = places(0, ranges, 20)
    kept = [batch for batch in itertools.islice(itertools.count(1), 60) if batch not in skipped]
    assert [place.batch for place in straight] == kept[:20]
    assert all(place.first_sample == (place.batch - 1) * SIZE for place in straight)
    behind = sum(1 + place.skipped for place in straight[:stop])
    assert places(behind, ranges, 20 - stop) == straight[stop:]
