"""The documents of one split of one unit as columns: encoded in batches, given out as shards."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from data_prep.encoder import Encoder
from data_prep.shards import ShardRows
from data_prep.tokenizer import TokenArray

BATCH_BYTES = 1 << 22


class Columns:
    """Collects documents; texts are encoded some megabytes at a time.

    Args:
        encoder: Makes ids of texts.
        limit_tokens: Most tokens in one shard; a longer document still gets one of its own.
    """

    def __init__(self, encoder: Encoder, limit_tokens: int) -> None:
        self._encoder = encoder
        self._limit = limit_tokens
        self._texts: list[bytes] = []
        self._text_bytes = 0
        self._tokens: list[TokenArray] = []
        self._num_tokens = 0
        self._lengths: list[NDArray[np.int64]] = []
        self._src: list[int] = []
        self._row: list[int] = []

    def add(self, file: int, texts: Sequence[bytes], rows: Sequence[int]) -> Iterator[ShardRows]:
        """Append documents of one file; give the shards that are full by now."""
        for first, last in _cut_batch(texts):
            part = texts[first:last]
            self._texts += part
            self._src += [file] * len(part)
            self._row += rows[first:last]
            self._text_bytes += sum(map(len, part))
            if self._text_bytes >= BATCH_BYTES:
                self._encode()
                if self._num_tokens > self._limit:
                    yield from self._give_full()

    def finish(self) -> Iterator[ShardRows]:
        """The shards of all documents that are left."""
        self._encode()
        if self._src:
            yield from cut_rows(self._join(), self._limit)

    def _encode(self) -> None:
        if self._texts:
            tokens, lengths = self._encoder.encode(self._texts)
            self._tokens.append(tokens)
            self._num_tokens += len(tokens)
            self._lengths.append(lengths)
            self._texts = []
            self._text_bytes = 0

    def _give_full(self) -> Iterator[ShardRows]:
        """All but the last piece of what is there: later documents may still fit into that one."""
        pieces = list(cut_rows(self._join(), self._limit))
        last = pieces.pop()
        yield from pieces
        # A copy, so that the rest of the tokens is let go.
        self._tokens, self._num_tokens = [last.tokens.copy()], len(last.tokens)
        self._lengths = [np.diff(last.offsets)]
        self._src, self._row = last.src.tolist(), last.row.tolist()

    def _join(self) -> ShardRows:
        """All documents that were encoded; their pieces are let go on the way."""
        tokens: TokenArray = np.empty(self._num_tokens, self._encoder.dtype)
        start = 0
        for number, piece in enumerate(self._tokens):
            tokens[start : start + len(piece)] = piece
            start += len(piece)
            self._tokens[number] = piece[:0].copy()
        assert start == self._num_tokens, (start, self._num_tokens)
        lengths = np.concatenate(self._lengths)
        self._tokens, self._num_tokens = [], 0
        return ShardRows(
            tokens=tokens,
            offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
            src=np.array(self._src, dtype=np.uint32),
            row=np.array(self._row, dtype=np.uint64),
        )


def cut_rows(rows: ShardRows, limit_tokens: int) -> Iterator[ShardRows]:
    """Cut columns between documents into pieces of at most `limit_tokens`, one document at least.

    Example: lengths 3, 3, 9, 1 with a limit of 6 give rows [0:2], [2:3], [3:4].
    """
    first, num_rows = 0, len(rows.src)
    while first < num_rows:
        base = rows.offsets[first]
        last = int(np.searchsorted(rows.offsets, base + limit_tokens, side="right")) - 1
        last = min(max(last, first + 1), num_rows)
        yield ShardRows(
            tokens=rows.tokens[base : rows.offsets[last]],
            offsets=rows.offsets[first : last + 1] - base,
            src=rows.src[first:last],
            row=rows.row[first:last],
        )
        first = last


def _cut_batch(texts: Sequence[bytes]) -> Iterator[tuple[int, int]]:
    """Ranges of about BATCH_BYTES of text, so that no batch of a reader is encoded at once."""
    if sum(map(len, texts)) <= 2 * BATCH_BYTES:
        yield 0, len(texts)
        return
    first, held = 0, 0
    for number, text in enumerate(texts, 1):
        held += len(text)
        if held >= BATCH_BYTES or number == len(texts):
            yield first, number
            first, held = number, 0
