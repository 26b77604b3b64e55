"""Where each step's global batch lies in the data order, with the batches that are jumped over."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class BatchPlace(NamedTuple):
    """A global batch to train on.

    Attributes:
        batch: Its number in the data order, from 1; the step's number while nothing was skipped.
        first_sample: Its first sample.
        skipped: Batches jumped over right before it.
    """

    batch: int
    first_sample: int
    skipped: int


def batch_places(
    *,
    batches_behind: int,
    next_sample: int,
    batch_samples: int,
    skip: Sequence[tuple[int, int]],
) -> Iterator[BatchPlace]:
    """The batches from a position on, without those in the ranges of `skip`.

    Example with 3 batches behind, next sample 24, batches of 8 samples and [5, 6] to skip: batches
    4, 7, 8, ... with first samples 24, 48, 56, ...; batch 7 jumps over 2.

    Args:
        batches_behind: Batches that were trained on or skipped before.
        next_sample: The sample after those.
        batch_samples: Samples of a batch.
        skip: `(first, last)` batch numbers, both included; ranges do not overlap.
    """
    ranges = sorted(skip)
    while True:
        batch, skipped = batches_behind + 1, 0
        for first, last in ranges:
            if first <= batch <= last:
                skipped += last + 1 - batch
                batch = last + 1
        next_sample += skipped * batch_samples
        yield BatchPlace(batch, next_sample, skipped)
        batches_behind, next_sample = batch, next_sample + batch_samples
