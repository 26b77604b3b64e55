"""The batches of a run's steps in the data order, without those that are skipped."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import NamedTuple

from data_prep.loading.loader import Batch, TokenLoader


class BatchPosition(NamedTuple):
    """A global batch to train on.

    Attributes:
        batch: Its number in the data order, from 1; the step's number while nothing was skipped.
        first_sample: Its first sample.
        skipped: Batches jumped over right before it.
    """

    batch: int
    first_sample: int
    skipped: int


def batch_positions(
    *,
    batches_behind: int,
    next_sample: int,
    batch_samples: int,
    skip: Sequence[tuple[int, int]],
) -> Iterator[BatchPosition]:
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
        yield BatchPosition(batch, next_sample, skipped)
        batches_behind, next_sample = batch, next_sample + batch_samples


def stretch_positions(
    *, batches_behind: int, next_sample: int, end: int, batch_samples: int
) -> Iterator[BatchPosition]:
    """The batches from a position to an end, of which the last has what is left.

    Example with 3 batches behind, next sample 24, end 42 and batches of 8 samples: batches 4, 5 and
    6 with first samples 24, 32 and 40.

    Args:
        batches_behind: Batches that were trained on before.
        next_sample: The sample after those.
        end: The sample before which to stop.
        batch_samples: Samples of a batch.
    """
    for batch, first in enumerate(range(next_sample, end, batch_samples), batches_behind + 1):
        yield BatchPosition(batch, first, 0)


class StepBatches(NamedTuple):
    """What a rank trains on in one step.

    Attributes:
        position: of the global batch in the data order.
        micro_batches: this rank's share of it.
    """

    position: BatchPosition
    micro_batches: list[Batch]


def read_steps(
    loader: TokenLoader, positions: Callable[[], Iterator[BatchPosition]], steps_ahead: int
) -> Generator[StepBatches, None, None]:
    """One step's batches after the other, read ahead by a thread; close it to stop the thread.

    Args:
        loader: of this rank.
        positions: a new iterator over the positions of all steps to come. Two are taken, one for
            the thread that reads ahead and one for the steps.
        steps_ahead: steps held ready.

    Raises:
        DataError: reading failed.
    """
    first_samples = (position.first_sample for position in positions())
    with closing(loader.prefetch(first_samples, steps_ahead)) as ahead:
        for position, batches in zip(positions(), ahead, strict=False):
            yield StepBatches(position, batches)
