"""The documents of one split of one unit as columns: encoded in batches, given out as shards."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from data_prep.conversations.encoding import encode_marked
from data_prep.shards.arrow_file import ShardRows
from data_prep.tokenization.encoder import Encoder
from data_prep.tokenization.tokenizer import TokenArray

BATCH_BYTES = 1 << 22
LARGEST_ROOM_TOKENS = 1 << 24
LARGEST_LIMIT_TOKENS = 1 << 60


class Columns:
    """Collects documents; texts are encoded some megabytes at a time.

    Args:
        encoder: Makes ids of texts.
        limit_tokens: Most tokens in one shard; a longer document still gets one of its own.
        marked: Texts are marked (`data_prep.conversations.marks`), and shards get targets.
    """

    def __init__(self, encoder: Encoder, limit_tokens: int, *, marked: bool = False) -> None:
        self._encoder = encoder
        self._limit = min(limit_tokens, LARGEST_LIMIT_TOKENS)
        self._texts: list[bytes] = []
        self._text_bytes = 0
        # Not touched, not in memory: the room is virtual until tokens are put there.
        self._tokens: TokenArray = np.empty(min(limit_tokens, LARGEST_ROOM_TOKENS), encoder.dtype)
        self._num_tokens = 0
        self._marked = marked
        self._targets: list[NDArray[np.bool_]] = []
        self._lengths: list[NDArray[np.int64]] = []
        self._src: list[int] = []
        self._row: list[int] = []

    def add(self, file: int, texts: Sequence[bytes], offsets: Sequence[int]) -> Iterator[ShardRows]:
        """Append documents of one file; give the shards that are full by now.

        A shard that is given is a view: it is to be written before the next one is asked for.
        """
        for first, last in _cut_batch(texts):
            part = texts[first:last]
            self._texts += part
            self._src += [file] * len(part)
            self._row += offsets[first:last]
            self._text_bytes += sum(map(len, part))
            if self._text_bytes >= BATCH_BYTES:
                self._encode()
                if self._num_tokens > self._limit:
                    yield from self._give_full()

    def finish(self) -> Iterator[ShardRows]:
        """The shards of all documents that are left."""
        self._encode()
        if self._src:
            yield from cut_shards(self._join(), self._limit)

    def _encode(self) -> None:
        if self._texts:
            if self._marked:
                tokens, lengths, targets = encode_marked(self._encoder, self._texts)
                self._targets.append(targets)
            else:
                tokens, lengths = self._encoder.encode(self._texts)
            self._keep(tokens)
            self._lengths.append(lengths)
            self._texts = []
            self._text_bytes = 0

    def _keep(self, tokens: TokenArray) -> None:
        """Put tokens behind those that are there."""
        needed = self._num_tokens + len(tokens)
        if needed > len(self._tokens):
            grown: TokenArray = np.empty(max(needed, 5 * needed // 4), self._tokens.dtype)
            grown[: self._num_tokens] = self._tokens[: self._num_tokens]
            self._tokens = grown
        self._tokens[self._num_tokens : needed] = tokens
        self._num_tokens = needed

    def _give_full(self) -> Iterator[ShardRows]:
        """All but the last piece of what is there: later documents may still fit into that one."""
        pieces = list(cut_shards(self._join(), self._limit))
        last = pieces.pop()
        yield from pieces
        self._tokens[: len(last.tokens)] = last.tokens.copy()
        self._num_tokens = len(last.tokens)
        self._lengths = [np.diff(last.offsets)]
        self._targets = [] if last.targets is None else [last.targets]
        self._src, self._row = last.src.tolist(), last.row.tolist()

    def _join(self) -> ShardRows:
        """All documents that were encoded and not given yet."""
        lengths = np.concatenate(self._lengths)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        assert int(offsets[-1]) == self._num_tokens, (offsets[-1], self._num_tokens)
        return ShardRows(
            tokens=self._tokens[: self._num_tokens],
            offsets=offsets,
            src=np.array(self._src, dtype=np.uint32),
            row=np.array(self._row, dtype=np.uint64),
            targets=np.concatenate(self._targets) if self._marked else None,
        )


def cut_shards(rows: ShardRows, limit_tokens: int) -> Iterator[ShardRows]:
    """Cut columns between documents into shards of at most `limit_tokens`, one document at least.

    Example: lengths 3, 3, 9, 1 with a limit of 6 give documents [0:2], [2:3], [3:4].
    """
    first, num_documents = 0, len(rows.src)
    while first < num_documents:
        base = rows.offsets[first]
        last = int(np.searchsorted(rows.offsets, base + limit_tokens, side="right")) - 1
        last = min(max(last, first + 1), num_documents)
        yield ShardRows(
            tokens=rows.tokens[base : rows.offsets[last]],
            offsets=rows.offsets[first : last + 1] - base,
            src=rows.src[first:last],
            row=rows.row[first:last],
            targets=None if rows.targets is None else rows.targets[base : rows.offsets[last]],
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
