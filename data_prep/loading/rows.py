"""Streams cut into training rows: every S tokens (concat), or whole documents (best fit).

Legend: S sequence length, n future tokens. A row has S + n places: S inputs, and n more that only
serve as targets.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from data_prep.loading.packing import pack
from data_prep.shards.shard_set import ShardSet
from data_prep.tokenization.tokenizer import TokenArray

PackingName = Literal["concat", "best_fit"]


class Rows(Protocol):
    """The training rows of one stream.

    Attributes:
        count: Number of rows.
        padding_share: Share of input positions without a token.
    """

    count: int
    padding_share: float

    def fill(
        self,
        rows: Sequence[int],
        tokens: Sequence[TokenArray],
        documents: Sequence[NDArray[np.int32]] | None,
    ) -> list[int]:
        """Write some rows.

        Args:
            rows: Which ones.
            tokens: For each an array `[S + n]` of the set's dtype, to be filled.
            documents: For each an array `[S + n]`, to be filled with the number of each place's
                document within the row; or None.

        Returns:
            For each how many places hold tokens; the others hold end-of-document tokens and a
            document number of their own.

        Raises:
            DataError: A file cannot be read or ends early.
        """


def cut_rows(
    shards: ShardSet, packing: PackingName, *, sequence_length: int, future_tokens: int
) -> Rows:
    """The rows of a stream."""
    kind = ConcatRows if packing == "concat" else PackedRows
    return kind(shards, sequence_length=sequence_length, future_tokens=future_tokens)


class ConcatRows:
    """Row i starts at token i * S: documents end to end, cut wherever a row ends.

    Rows overlap by n, so that the last positions have all their targets and the next row starts
    where the inputs of this one end.
    """

    padding_share = 0.0

    def __init__(self, shards: ShardSet, *, sequence_length: int, future_tokens: int) -> None:
        self._shards = shards
        self._length = sequence_length
        self.count = max(0, (shards.num_tokens - future_tokens) // sequence_length)

    def fill(
        self,
        rows: Sequence[int],
        tokens: Sequence[TokenArray],
        documents: Sequence[NDArray[np.int32]] | None,
    ) -> list[int]:
        """Write some rows; see `Rows.fill`."""
        starts = [row * self._length for row in rows]
        self._shards.read_rows(starts, tokens)
        for start, numbers in zip(starts, documents or (), strict=False):
            numbers[:] = 0
            numbers[self._shards.document_starts(start + 1, len(numbers) - 1) - start] = 1
            np.cumsum(numbers, out=numbers)
        return [len(row) for row in tokens]


class PackedRows:
    """Each row holds whole documents, packed best-fit (`data_prep.loading.packing`), and padding.

    A document longer than S has rows of its own and a rest, which is packed with others; a row of
    its own continues into the n target places with the document's next tokens.

    In memory: 12 bytes per document and 8 per row.
    """

    def __init__(self, shards: ShardSet, *, sequence_length: int, future_tokens: int) -> None:
        self._shards = shards
        lengths = shards.document_lengths()
        packing = pack(lengths, sequence_length)
        self.count = packing.num_rows
        self.padding_share = packing.padding_share
        self._rows, self._starts, self._lengths = packing.rows, packing.starts, packing.lengths
        self._continue_rows(np.cumsum(lengths), sequence_length, future_tokens)

    def fill(
        self,
        rows: Sequence[int],
        tokens: Sequence[TokenArray],
        documents: Sequence[NDArray[np.int32]] | None,
    ) -> list[int]:
        """Write some rows; see `Rows.fill`."""
        return [
            self._fill_row(row, tokens[place], None if documents is None else documents[place])
            for place, row in enumerate(rows)
        ]

    def _fill_row(self, row: int, tokens: TokenArray, documents: NDArray[np.int32] | None) -> int:
        pieces = slice(int(self._rows[row]), int(self._rows[row + 1]))
        lengths = self._lengths[pieces].tolist()
        ends: list[int] = list(accumulate(lengths))
        targets = [tokens[end - length : end] for end, length in zip(ends, lengths, strict=True)]
        self._shards.read_rows(self._starts[pieces].tolist(), targets)
        tokens[ends[-1] :] = self._shards.eos_id
        if documents is not None:
            documents[: ends[-1]] = np.repeat(np.arange(len(lengths)), lengths)
            documents[ends[-1] :] = len(lengths)
        return ends[-1]

    def _continue_rows(self, ends: NDArray[np.int64], length: int, targets: int) -> None:
        """Let pieces that fill a row go on into its target places, up to their document's end."""
        whole = np.flatnonzero(self._lengths == length)
        starts = self._starts[whole]
        document_ends = ends[np.searchsorted(ends, starts, side="right")]
        room = np.minimum(document_ends - starts, length + targets)
        self._lengths[whole] = room.astype(np.int32)
