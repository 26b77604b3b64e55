"""Whole documents into sequences of one length, from their lengths alone: best fit, or one each."""

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Packing(NamedTuple):
    """Sequences of pieces; a piece is a document, or a part of one that is longer than a sequence.

    Example with sequences of 4 and documents of 3, 6, 1 and 2 tokens: the second document is cut
    into 4 and 2, and the sequences are, as positions in the stream, [3 .. 6], [0 .. 2, 9] and
    [7 .. 8, 10 .. 11]. None has padding.

    Attributes:
        starts: Position in the stream of each piece, sequence by sequence.
        lengths: Tokens of each piece.
        first_piece: Sequence i has pieces first_piece[i] to first_piece[i + 1].
        sequence_length: Tokens that fit into a sequence.
    """

    starts: NDArray[np.int64]
    lengths: NDArray[np.int32]
    first_piece: NDArray[np.int64]
    sequence_length: int

    @property
    def num_sequences(self) -> int:
        """Number of sequences."""
        return len(self.first_piece) - 1

    @property
    def padding_share(self) -> float:
        """Share of positions that hold no token."""
        room = self.num_sequences * self.sequence_length
        return 1 - int(self.lengths.sum(dtype=np.int64)) / room if room else 0.0


def pack(document_lengths: NDArray[np.int64], sequence_length: int) -> Packing:
    """Pack documents into sequences, longest first, each where it leaves the least room.

    A document longer than a sequence is cut into sequences and a rest, which is packed like a
    document; no other is cut. Sequences with the same room left and documents of the same length
    are handled together, so the time grows with the number of different lengths, plus two sorts.
    The result is a pure function of the arguments.

    Args:
        document_lengths: Tokens of each document, in stream order; each at least 1.
        sequence_length: Tokens that fit into a sequence.
    """
    starts, lengths = _cut(document_lengths, sequence_length)
    longest_first = np.argsort(-lengths, kind="stable")
    sequence_of = _best_fit(np.bincount(lengths, minlength=sequence_length + 1), sequence_length)
    num_sequences = int(sequence_of.max()) + 1 if len(sequence_of) else 0
    order = longest_first[np.argsort(sequence_of, kind="stable")]
    first_piece = np.zeros(num_sequences + 1, np.int64)
    np.cumsum(np.bincount(sequence_of, minlength=num_sequences), out=first_piece[1:])
    return Packing(starts[order], lengths[order], first_piece, sequence_length)


def one_per_sequence(document_lengths: NDArray[np.int64], sequence_length: int) -> Packing:
    """A sequence for each document, with padding; one longer than a sequence gets several.

    Args:
        document_lengths: Tokens of each document, in stream order; each at least 1.
        sequence_length: Tokens that fit into a sequence.
    """
    starts, lengths = _cut(document_lengths, sequence_length)
    return Packing(starts, lengths, np.arange(len(starts) + 1), sequence_length)


def _cut(
    document_lengths: NDArray[np.int64], sequence_length: int
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Start and length of each piece, in stream order."""
    pieces = -(-document_lengths // sequence_length)
    ends = np.cumsum(document_lengths)
    first_piece = np.cumsum(pieces) - pieces
    within = np.arange(int(pieces.sum())) - np.repeat(first_piece, pieces)
    starts = np.repeat(ends - document_lengths, pieces) + within * sequence_length
    lengths = np.minimum(np.repeat(ends, pieces) - starts, sequence_length)
    return starts, lengths.astype(np.int32)


class _Room:
    """Sequences by the room left in them."""

    def __init__(self, sequence_length: int) -> None:
        self.sequence_length = sequence_length
        self.num_sequences = 0
        self._sizes: list[int] = []
        self._with_room: dict[int, list[NDArray[np.int64]]] = {}

    def take(self, length: int, count: int) -> tuple[NDArray[np.int64], int]:
        """Sequences for `count` pieces of `length`: those with least room for one, else new ones.

        Returns:
            The sequences, at most as many as are needed, and the room in each.
        """
        index = bisect_left(self._sizes, length)
        if index == len(self._sizes):
            wanted = -(-count // (self.sequence_length // length))
            self.num_sequences += wanted
            return np.arange(self.num_sequences - wanted, self.num_sequences), self.sequence_length
        size = self._sizes[index]
        groups = self._with_room[size]
        group = groups.pop(0)
        wanted = -(-count // (size // length))
        if wanted < len(group):
            groups.insert(0, group[wanted:])
        if not groups:
            del self._sizes[index], self._with_room[size]
        return group[:wanted], size

    def put(self, sequences: NDArray[np.int64], size: int) -> None:
        """Give sequences back with the room that is left in each."""
        if size and len(sequences):
            if size not in self._with_room:
                insort(self._sizes, size)
                self._with_room[size] = []
            self._with_room[size].append(sequences)


def _best_fit(counts: NDArray[np.int64], sequence_length: int) -> NDArray[np.int64]:
    """The sequence of each piece, longest piece first; counts[l] pieces have length l."""
    sequence_of = np.empty(int(counts.sum()), np.int64)
    room = _Room(sequence_length)
    done = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            sequences, size = room.take(length, left)
            # Filled one after the other: a sequence that has just taken a piece is the best fit for
            # the next one of the same length, until none fits any more.
            each = size // length
            placed = min(left, each * len(sequences))
            sequence_of[done : done + placed] = np.repeat(sequences, each)[:placed]
            full, rest = divmod(placed, each)
            room.put(sequences[:full], size - each * length)
            if rest:
                room.put(sequences[full:], size - rest * length)
            done += placed
            left -= placed
    return sequence_of
