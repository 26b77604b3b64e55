"""Which sequences stay when those of the lowest loss are left out: exact, and a bit for each.

Sequences are ordered by (loss, number), and the first ones go. A loss that is not a number counts
as the highest. What stays is a bitmap with counts, which finds the r-th sequence that stays without
a list of them: 0.14 bytes a sequence instead of 8.
"""

from typing import Self

import numpy as np
from numpy.typing import NDArray

_GROUP_BYTES = 64
_GROUP = 8 * _GROUP_BYTES  # bits
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)
_CHUNK = 1 << 24  # sequences looked at together; a multiple of 8


class KeptSequences:
    """The sequences that stay, in the order of their numbers.

    Args:
        bits: `[ceil(total / 8)]` uint8, a bit for each sequence, the highest bit of a byte first.
        total: sequences in all.

    Attributes:
        bits: as given.
        total: as given.
        count: how many stay.
    """

    def __init__(self, bits: NDArray[np.uint8], total: int) -> None:
        assert bits.shape == (-(-total // 8),), (bits.shape, total)
        self.bits = bits
        self.total = total
        padded = bits
        if missing := -len(bits) % _GROUP_BYTES:
            padded = np.concatenate([bits, np.zeros(missing, np.uint8)])
        self._groups = padded.reshape(-1, _GROUP_BYTES)
        counts = np.zeros(len(self._groups) + 1, np.int64)
        for start in range(0, len(self._groups), _CHUNK // _GROUP):
            part = self._groups[start : start + _CHUNK // _GROUP]
            counts[1 + start : 1 + start + len(part)] = _ONES[part].sum(1, dtype=np.int64)
        self._before = np.cumsum(counts)
        self.count = int(self._before[-1])

    def __call__(self, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers of the sequences that stay, by their ranks, each in 0..count-1."""
        assert ranks.size == 0 or int(ranks.max()) < self.count, (ranks.max(), self.count)
        groups = np.searchsorted(self._before, ranks, side="right") - 1
        within = (ranks - self._before[groups]).astype(np.int16)
        # The first byte of the group, and in it the first bit, by which one more is set than come
        # before the wanted one.
        parts = self._groups[groups]
        byte, within = _place_of(within, _ONES[parts])
        bits = np.unpackbits(parts[np.arange(len(parts)), byte, None], axis=1)
        bit, _ = _place_of(within, bits)
        numbers: NDArray[np.int64] = groups * _GROUP + byte * 8 + bit
        return numbers

    @classmethod
    def by_loss(cls, losses: NDArray[np.float32], dropped: int) -> Self:
        """Leave out the `dropped` sequences that come first by (loss, number).

        Needs a copy of the losses, and nothing else of their size.

        Args:
            losses: `[total]`.
            dropped: how many go, fewer than all.
        """
        total = len(losses)
        assert 0 <= dropped < total, (dropped, total)
        bits = np.full(-(-total // 8), 0xFF, np.uint8)
        if total % 8:
            bits[-1] = 0xFF << (8 - total % 8) & 0xFF
        if not dropped:
            return cls(bits, total)
        copy = _comparable(losses)
        copy.partition(dropped - 1)
        highest = copy[dropped - 1]  # of those that go
        ties = dropped - int(np.count_nonzero(copy[:dropped] < highest))
        del copy
        for start in range(0, total, _CHUNK):
            part = _comparable(losses[start : start + _CHUNK])
            goes = part < highest
            equal = np.flatnonzero(part == highest)[:ties]
            goes[equal] = True
            ties -= len(equal)
            bits[start // 8 : start // 8 + -(-len(part) // 8)] &= ~np.packbits(goes)
        return cls(bits, total)


def _place_of(
    ranks: NDArray[np.int16], counts: NDArray[np.uint8]
) -> tuple[NDArray[np.int64], NDArray[np.int16]]:
    """The column in which the ranks-th of what is counted in a row is, and its rank in there."""
    so_far = counts.cumsum(1, dtype=np.int16)
    place = (so_far > ranks[:, None]).argmax(1)
    rows = np.arange(len(counts))
    return place, ranks - (so_far[rows, place] - counts[rows, place])


def _comparable(losses: NDArray[np.float32]) -> NDArray[np.float32]:
    """A copy in which what is not a number is higher than all that are."""
    copy = losses.astype(np.float32, copy=True)
    copy[np.isnan(copy)] = np.inf
    return copy
