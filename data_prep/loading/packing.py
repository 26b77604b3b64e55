"""Best-fit packing: whole documents into rows of one length, from the documents' lengths alone."""

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Packing(NamedTuple):
    """Rows of pieces; a piece is a document, or a part of one that is longer than a row.

    Example with rows of 4 and documents of 3, 6, 1 and 2 tokens: the second document is cut into 4
    and 2, and the rows are, as positions in the stream, [3 .. 6], [0 .. 2, 9] and
    [7 .. 8, 10 .. 11]. None has padding.

    Attributes:
        starts: Position in the stream of each piece, row by row.
        lengths: Tokens of each piece.
        rows: Row r has pieces rows[r] to rows[r + 1].
        row_length: Tokens that fit into a row.
    """

    starts: NDArray[np.int64]
    lengths: NDArray[np.int32]
    rows: NDArray[np.int64]
    row_length: int

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.rows) - 1

    @property
    def padding_share(self) -> float:
        """Share of positions that hold no token."""
        room = self.num_rows * self.row_length
        return 1 - int(self.lengths.sum(dtype=np.int64)) / room if room else 0.0


def pack(document_lengths: NDArray[np.int64], row_length: int) -> Packing:
    """Pack documents into rows, longest first, each where it leaves the least room.

    A document longer than a row is cut into rows and a rest, which is packed like a document; no
    other is cut. Rows with the same room left and documents of the same length are handled
    together, so the time grows with the number of different lengths, plus two sorts. The result is
    a pure function of the arguments.

    Args:
        document_lengths: Tokens of each document, in stream order; each at least 1.
        row_length: Tokens that fit into a row.
    """
    starts, lengths = _cut(document_lengths, row_length)
    longest_first = np.argsort(-lengths, kind="stable")
    row_of = _best_fit(np.bincount(lengths, minlength=row_length + 1), row_length)
    num_rows = int(row_of.max()) + 1 if len(row_of) else 0
    order = longest_first[np.argsort(row_of, kind="stable")]
    rows = np.zeros(num_rows + 1, np.int64)
    np.cumsum(np.bincount(row_of, minlength=num_rows), out=rows[1:])
    return Packing(starts[order], lengths[order], rows, row_length)


def _cut(
    document_lengths: NDArray[np.int64], row_length: int
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Start and length of each piece, in stream order."""
    pieces = -(-document_lengths // row_length)
    ends = np.cumsum(document_lengths)
    first_piece = np.cumsum(pieces) - pieces
    within = np.arange(int(pieces.sum())) - np.repeat(first_piece, pieces)
    starts = np.repeat(ends - document_lengths, pieces) + within * row_length
    lengths = np.minimum(np.repeat(ends, pieces) - starts, row_length)
    return starts, lengths.astype(np.int32)


class _Room:
    """Rows by the room left in them."""

    def __init__(self, row_length: int) -> None:
        self.row_length = row_length
        self.num_rows = 0
        self._sizes: list[int] = []
        self._rows: dict[int, list[NDArray[np.int64]]] = {}

    def take(self, length: int, count: int) -> tuple[NDArray[np.int64], int]:
        """Rows for `count` pieces of `length`: those with the least room for one, else new ones.

        Returns:
            The rows, at most as many as are needed, and the room in each.
        """
        place = bisect_left(self._sizes, length)
        if place == len(self._sizes):
            wanted = -(-count // (self.row_length // length))
            self.num_rows += wanted
            return np.arange(self.num_rows - wanted, self.num_rows), self.row_length
        size = self._sizes[place]
        groups = self._rows[size]
        group = groups.pop(0)
        wanted = -(-count // (size // length))
        if wanted < len(group):
            groups.insert(0, group[wanted:])
        if not groups:
            del self._sizes[place], self._rows[size]
        return group[:wanted], size

    def put(self, rows: NDArray[np.int64], size: int) -> None:
        """Give rows back with the room that is left in each."""
        if size and len(rows):
            if size not in self._rows:
                insort(self._sizes, size)
                self._rows[size] = []
            self._rows[size].append(rows)


def _best_fit(counts: NDArray[np.int64], row_length: int) -> NDArray[np.int64]:
    """The row of each piece, longest piece first; counts[l] pieces have length l."""
    row_of = np.empty(int(counts.sum()), np.int64)
    room = _Room(row_length)
    done = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            rows, size = room.take(length, left)
            # Filled one after the other: a row that has just taken a piece is the best fit for
            # the next one of the same length, until none fits any more.
            each = size // length
            placed = min(left, each * len(rows))
            row_of[done : done + placed] = np.repeat(rows, each)[:placed]
            full, rest = divmod(placed, each)
            room.put(rows[:full], size - each * length)
            if rest:
                room.put(rows[full:], size - rest * length)
            done += placed
            left -= placed
    return row_of
