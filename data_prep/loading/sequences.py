"""Streams cut into training sequences: every S tokens (concat), or by whole documents.

Legend: S sequence length, n future tokens. A sequence has S + n positions: S inputs, and n more
that only serve as targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from data_prep.loading.packing import one_per_sequence, pack
from data_prep.shards.shard_set import ShardSet
from data_prep.tokenization.tokenizer import TokenArray

PackingName = Literal["concat", "best_fit", "one_per_sequence"]
_PACKINGS = {"best_fit": pack, "one_per_sequence": one_per_sequence}


@dataclass(frozen=True)
class SequenceFormat:
    """How streams of tokens become training sequences.

    Attributes:
        sequence_length: S, input tokens of a sequence.
        future_tokens: n, targets per position.
        packing: How streams are cut into sequences.
        documents: Number each token's document, and give no target across documents.
    """

    sequence_length: int
    future_tokens: int
    packing: PackingName = "concat"
    documents: bool = False

    def __post_init__(self) -> None:
        assert min(self.sequence_length, self.future_tokens) > 0, self

    @property
    def stored_tokens(self) -> int:
        """S + n, the tokens of a sequence with the ones after it that are only targets."""
        return self.sequence_length + self.future_tokens


class TrainingSequences(Protocol):
    """The training sequences of one stream.

    Attributes:
        count: Number of sequences.
        padding_share: Share of input positions without a token.
    """

    count: int
    padding_share: float

    def fill(
        self,
        numbers: Sequence[int],
        tokens: Sequence[TokenArray],
        documents: Sequence[NDArray[np.int32]] | None,
        targets: Sequence[NDArray[np.bool_]] | None = None,
    ) -> list[int]:
        """Write some sequences.

        Args:
            numbers: Which ones.
            tokens: For each an array `[S + n]` of the set's dtype, to be filled.
            documents: For each an array `[S + n]`, to be filled with the number of each position's
                document within the sequence; or None.
            targets: For each an array `[S + n]`, to be filled with whether each position's token
                may be a target; or None. What is no token stays as it was.

        Returns:
            For each how many positions hold tokens; the others hold end-of-document tokens and a
            document number of their own.

        Raises:
            DataError: A file cannot be read or ends early.
        """


def cut_sequences(shards: ShardSet, sequence_format: SequenceFormat) -> TrainingSequences:
    """The sequences of a stream."""
    packed = sequence_format.packing in _PACKINGS
    kind = PackedSequences if packed else ConcatenatedSequences
    return kind(shards, sequence_format)


class ConcatenatedSequences:
    """Sequence i starts at token i * S: documents end to end, cut wherever a sequence ends.

    Sequences overlap by n, so that the last positions have all their targets and the next sequence
    starts where the inputs of this one end.
    """

    padding_share = 0.0

    def __init__(self, shards: ShardSet, sequence_format: SequenceFormat) -> None:
        self._shards = shards
        self._length = sequence_format.sequence_length
        self.count = max(0, (shards.num_tokens - sequence_format.future_tokens) // self._length)

    def fill(
        self,
        numbers: Sequence[int],
        tokens: Sequence[TokenArray],
        documents: Sequence[NDArray[np.int32]] | None,
        targets: Sequence[NDArray[np.bool_]] | None = None,
    ) -> list[int]:
        """Write some sequences; see `TrainingSequences.fill`."""
        starts = [number * self._length for number in numbers]
        self._shards.read_many(starts, tokens)
        for start, document_of in zip(starts, documents or (), strict=False):
            document_of[:] = 0
            document_of[self._shards.document_starts(start + 1, len(document_of) - 1) - start] = 1
            np.cumsum(document_of, out=document_of)
        for start, target_of in zip(starts, targets or (), strict=False):
            self._shards.read_targets(start, target_of)
        return [len(part) for part in tokens]


class PackedSequences:
    """Whole documents, packed best-fit or one each (`data_prep.loading.packing`), and padding.

    A document longer than S has sequences of its own and a rest, which is packed like another; a
    sequence of its own continues into the n target positions with the document's next tokens.

    In memory: 12 bytes per document and 8 per sequence.
    """

    def __init__(self, shards: ShardSet, sequence_format: SequenceFormat) -> None:
        self._shards = shards
        lengths = shards.document_lengths()
        packing = _PACKINGS[sequence_format.packing](lengths, sequence_format.sequence_length)
        self.count = packing.num_sequences
        self.padding_share = packing.padding_share
        self._first_piece = packing.first_piece
        self._starts, self._lengths = packing.starts, packing.lengths
        self._extend_full(np.cumsum(lengths), sequence_format)

    def fill(
        self,
        numbers: Sequence[int],
        tokens: Sequence[TokenArray],
        documents: Sequence[NDArray[np.int32]] | None,
        targets: Sequence[NDArray[np.bool_]] | None = None,
    ) -> list[int]:
        """Write some sequences; see `TrainingSequences.fill`."""
        return [
            self._fill_one(
                number,
                tokens[index],
                None if documents is None else documents[index],
                None if targets is None else targets[index],
            )
            for index, number in enumerate(numbers)
        ]

    def _fill_one(
        self,
        number: int,
        tokens: TokenArray,
        documents: NDArray[np.int32] | None,
        targets: NDArray[np.bool_] | None,
    ) -> int:
        pieces = slice(int(self._first_piece[number]), int(self._first_piece[number + 1]))
        lengths = self._lengths[pieces].tolist()
        ends: list[int] = list(accumulate(lengths))
        starts: list[int] = self._starts[pieces].tolist()
        parts = [tokens[end - length : end] for end, length in zip(ends, lengths, strict=True)]
        self._shards.read_many(starts, parts)
        tokens[ends[-1] :] = self._shards.eos_id
        if documents is not None:
            documents[: ends[-1]] = np.repeat(np.arange(len(lengths)), lengths)
            documents[ends[-1] :] = len(lengths)
        if targets is not None:
            for start, length, end in zip(starts, lengths, ends, strict=True):
                self._shards.read_targets(start, targets[end - length : end])
        return ends[-1]

    def _extend_full(self, ends: NDArray[np.int64], sequence_format: SequenceFormat) -> None:
        """Extend pieces that fill a sequence into its target positions, as far as they can."""
        whole = np.flatnonzero(self._lengths == sequence_format.sequence_length)
        starts = self._starts[whole]
        document_ends = ends[np.searchsorted(ends, starts, side="right")]
        room = np.minimum(document_ends - starts, sequence_format.stored_tokens)
        self._lengths[whole] = room.astype(np.int32)
