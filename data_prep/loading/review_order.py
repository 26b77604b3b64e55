"""The order of a run that goes over its sequences in passes, some of them over chosen ones only.

Sequences of all sources are numbered through: those of the first source, then of the second, ...
A run may go over a part of them, number i being sequence floor(i * all / part) then.
Pass p has s sequences, those that its phase kept, and shows them in the order permutation(p) of
their ranks. Samples are counted over all passes, so that a run's position is one integer.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.loading.permutation import Permutation
from data_prep.loading.selection import KeptSequences


class Pass(NamedTuple):
    """One epoch over the sequences of a phase.

    Attributes:
        number: of passes before it in the whole run.
        phase: its phase, from 0.
        repetition: within the phase, from 0.
        epoch: within the repetition, from 0.
        first_sample: where it begins, counted over the whole run.
        size: samples of it.
        chosen: whether only the sequences that its phase kept are in it.
    """

    number: int
    phase: int
    repetition: int
    epoch: int
    first_sample: int
    size: int
    chosen: bool

    @property
    def end(self) -> int:
        """The sample after its last one."""
        return self.first_sample + self.size


class ReviewOrder:
    """The sequence that each sample of a run is; safe to share between threads.

    Args:
        passes: of the run, in their order.
        total: sequences that the run goes over.
        counts: sequences of each source, together at least as many.
        fingerprint: of the data; part of the key of each permutation.
        seed: the run's seed.

    Attributes:
        passes: as given.
        total: as given.
        fingerprint: as given.
    """

    def __init__(
        self,
        passes: Sequence[Pass],
        total: int,
        counts: Sequence[int],
        fingerprint: str,
        *,
        seed: int,
    ) -> None:
        self.passes = tuple(passes)
        self.total = total
        self.fingerprint = fingerprint
        self._seed = seed
        self._firsts = [one.first_sample for one in self.passes]
        self._source_starts = np.cumsum([0, *counts])
        assert 0 < total <= self._source_starts[-1] < 1 << 31, (total, counts)
        self._kept: dict[int, KeptSequences] = {}

    @property
    def end(self) -> int:
        """Samples of the whole run."""
        return self.passes[-1].end

    def keep(self, phase: int, kept: KeptSequences) -> None:
        """Say which sequences a phase has; before one of its samples is asked for."""
        self._kept[phase] = kept

    def pass_at(self, sample: int) -> Pass:
        """The pass that a sample is in; of one past the end the last pass."""
        return self.passes[bisect_right(self._firsts, sample) - 1]

    def first_sample_of(self, phase: int) -> int:
        """Where a phase begins."""
        return next(one.first_sample for one in self.passes if one.phase == phase)

    def step_end(self, sample: int, batch: int) -> int:
        """The end of the step that begins with a sample: `batch` samples on, or sooner.

        A step goes on into the next pass, unless that pass's sequences are chosen by losses that
        are not all known before the step: then it ends there, and so it does with the run.
        """
        return min(sample + batch, self.stretch_end(sample))

    def stretch_end(self, sample: int) -> int:
        """The first sample after this one whose sequence is chosen by losses before it."""
        for before, one in zip(self.passes, self.passes[1:], strict=False):
            if one.first_sample > sample and one.chosen and one.phase != before.phase:
                return one.first_sample
        return self.end

    def numbers(self, first_sample: int, count: int) -> NDArray[np.int64]:
        """The numbers of the sequences of a range of samples, over all sources."""
        parts = []
        end = first_sample + count
        assert 0 <= first_sample <= end <= self.end, (first_sample, count, self.end)
        while first_sample < end:
            now = self.pass_at(first_sample)
            stop = min(end, now.end)
            ranks = np.arange(first_sample - now.first_sample, stop - now.first_sample)
            permutation = Permutation(now.size, self.fingerprint, self._seed, now.number)
            ranks = permutation(ranks)
            parts.append(self._kept[now.phase](ranks) if now.chosen else ranks)
            first_sample = stop
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def locate(self, first_sample: int, count: int) -> tuple[list[int], list[int]]:
        """Number of the source, and of the sequence in it, of each sample of a range."""
        return self.places(self.numbers(first_sample, count))

    def places(self, numbers: NDArray[np.int64]) -> tuple[list[int], list[int]]:
        """Number of the source, and of the sequence in it, of sequences by their numbers."""
        numbers = numbers * self._source_starts[-1] // self.total
        sources = np.searchsorted(self._source_starts, numbers, side="right") - 1
        return sources.tolist(), (numbers - self._source_starts[sources]).tolist()
