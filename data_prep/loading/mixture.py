"""Which source a sample comes from: a pure function of its number and the history of the weights.

Weights hold for a segment of the run. They become counts per block of 65,536 samples, and a block
places the j-th of a source's c samples at (j + 1/2) / c of its length: every stretch of samples is
mixed as evenly as its length allows. So the number of samples a source has given before any sample
is arithmetic, and a change of weights neither loses nor repeats one: counters continue.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

BLOCK_SAMPLES = 65_536


class MixtureSegment(BaseModel):
    """Shares of the sources from a sample on.

    Attributes:
        first_sample: Where the segment starts, counted over the whole run.
        counts: Samples of each source in a block; together BLOCK_SAMPLES.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    first_sample: int
    counts: dict[str, int]

    def share(self, source: str) -> float:
        """The share of samples that come from a source."""
        return self.counts.get(source, 0) / BLOCK_SAMPLES


def block_counts(weights: Mapping[str, float]) -> dict[str, int]:
    """Weights as samples per block, by largest remainder.

    A source with a weight above 0 gets at least one sample of each block.

    Example: {"a": 2, "b": 1} gives {"a": 43691, "b": 21845}.
    """
    total = sum(weights.values())
    assert total > 0, weights
    assert min(weights.values()) >= 0, weights
    wanted = {name: weight / total * BLOCK_SAMPLES for name, weight in weights.items()}
    counts = {name: max(int(wanted[name]), int(weight > 0)) for name, weight in weights.items()}
    by_remainder = sorted(wanted, key=lambda name: counts[name] - wanted[name])
    for name in by_remainder[: max(0, BLOCK_SAMPLES - sum(counts.values()))]:
        counts[name] += 1
    # Sources raised to one sample take theirs from the largest.
    counts[max(counts, key=lambda name: counts[name])] += BLOCK_SAMPLES - sum(counts.values())
    return counts


class Mixture:
    """The source, and the position within it, of every sample of a run.

    Args:
        sources: Names, in the order of `locate`'s numbers.
        segments: In the order of their samples; the first starts at sample 0.
    """

    def __init__(self, sources: Sequence[str], segments: Iterable[MixtureSegment]) -> None:
        self.sources = tuple(sources)
        self.segments = tuple(segments)
        self._blocks = [_Block(self.sources, segment.counts) for segment in self.segments]
        self._first = np.array([segment.first_sample for segment in self.segments])
        assert self._first[0] == 0, self._first
        assert bool((np.diff(self._first) > 0).all()), self._first
        self._before = [np.zeros(len(self.sources), np.int64)]
        for block, length in zip(self._blocks, np.diff(self._first).tolist(), strict=False):
            self._before.append(self._before[-1] + block.counts_before(length))

    def locate(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source number of each sample, and how many samples that source gave before it."""
        source, index = np.empty_like(samples), np.empty_like(samples)
        segments = np.searchsorted(self._first, samples, side="right") - 1
        for segment in np.unique(segments).tolist():
            chosen = segments == segment
            within = samples[chosen] - self._first[segment]
            numbers, positions = self._blocks[segment].locate(within)
            source[chosen] = numbers
            index[chosen] = self._before[segment][numbers] + positions
        return source, index

    def counts(self, sample: int) -> dict[str, int]:
        """How many samples each source gave before sample number `sample`."""
        segment = int(np.searchsorted(self._first, sample, side="right")) - 1
        within = sample - int(self._first[segment])
        counts = self._before[segment] + self._blocks[segment].counts_before(within)
        return dict(zip(self.sources, counts.tolist(), strict=True))


class _Block:
    """The order of the sources within one block."""

    def __init__(self, sources: Sequence[str], counts: Mapping[str, int]) -> None:
        self._counts = np.array([counts.get(name, 0) for name in sources], np.int64)
        assert int(self._counts.sum()) == BLOCK_SAMPLES, counts
        numbers = np.repeat(np.arange(len(sources)), self._counts)
        ranks = np.concatenate([np.arange(count) for count in self._counts])
        # Equal quotients, as of two sources with equal counts, go by the order of the sources.
        order = np.argsort((ranks + 0.5) / self._counts[numbers], kind="stable")
        self._numbers = numbers[order].astype(np.uint16)
        self._ranks = ranks[order].astype(np.uint32)

    def locate(self, within: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source number of each sample of a segment, and its samples in the segment before it."""
        blocks, positions = np.divmod(within, BLOCK_SAMPLES)
        numbers = self._numbers[positions].astype(np.int64)
        return numbers, blocks * self._counts[numbers] + self._ranks[positions]

    def counts_before(self, within: int) -> NDArray[np.int64]:
        """Samples of each source among the first `within` of a segment."""
        blocks, position = divmod(within, BLOCK_SAMPLES)
        partial = np.bincount(self._numbers[:position], minlength=len(self._counts))
        counts: NDArray[np.int64] = blocks * self._counts + partial
        return counts
