"""A finished shard set, read as one stream of tokens with `preadv` at the recorded offsets."""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.errors import DataError
from data_prep.shards.manifest import (
    TOKENIZER,
    Manifest,
    ShardEntry,
    load_manifest,
    order_fingerprint,
)
from data_prep.shards.open_files import ShardFiles
from data_prep.tokenization.tokenizer import TokenArray, Tokenizer
from foundation.bounded_files import check_regular, read_bounded
from foundation.shown_text import printable

CHECKSUM_BLOCK_BYTES = 1 << 22
TOKENIZER_BYTES = 1 << 30
# Document offsets are read in blocks of a page.
OFFSETS_PER_READ = 512


class ShardSet:
    """One split of a shard set, or one source of it; made by `ShardSet.open`.

    The token stream is the shards in manifest order, documents end to end; a document is in one
    shard. Nothing is mapped and nothing but the manifest is kept in memory. Safe to share between
    threads.

    Attributes:
        directory: Folder of the set.
        split: "train" or "validation".
        manifest: The whole manifest.
        shards: Entries of the shards of this stream, in order.
        sources: Names of the sources that have documents in it.
        fingerprint: Changes when the token order of this stream changes.
        num_tokens: Length of the stream.
        num_documents: Documents in it.
        total_bytes: Size of its files.
        num_targets: Tokens that may be targets; all of them where the set does not say.
        has_targets: Whether some shards say which ones.
    """

    def __init__(
        self,
        directory: Path,
        split: str,
        manifest: Manifest,
        source: str | None = None,
        parent: "ShardSet | None" = None,
    ) -> None:
        self.directory = directory
        self.split = split
        self.manifest = manifest
        whole = [shard for shard in manifest.shards if shard.split == split]
        # The index of each shard of this stream among those of the split, whose files are shared.
        self._numbers = [
            number for number, shard in enumerate(whole) if source in (None, shard.source)
        ]
        self.shards: Sequence[ShardEntry] = [whole[number] for number in self._numbers]
        self.sources = tuple(dict.fromkeys(shard.source for shard in self.shards))
        self.fingerprint: str = (
            manifest.splits[split].fingerprint
            if source is None
            else order_fingerprint(
                manifest.tokenizer.sha256, manifest.tokenizer.eos_id, manifest.dtype, self.shards
            )
        )
        starts = [0]
        for shard in self.shards:
            starts.append(starts[-1] + shard.tokens)
        self.num_tokens = starts[-1]
        self.num_documents = sum(shard.rows for shard in self.shards)
        self.total_bytes = sum(shard.bytes for shard in self.shards)
        self.has_targets = any(shard.targets is not None for shard in self.shards)
        self.num_targets = sum(
            shard.tokens if shard.targets is None else shard.targets.count for shard in self.shards
        )
        self.dtype: np.dtype[Any] = np.dtype(manifest.dtype)
        self._starts = starts
        # Where token 0 of the stream would be in each file if the shard before reached that far.
        self._bases = [
            shard.values_offset - start * self.dtype.itemsize
            for shard, start in zip(self.shards, starts, strict=False)
        ]
        self._files: ShardFiles = parent._files if parent else ShardFiles(directory, whole)

    @classmethod
    def open(
        cls, directory: Path | str, split: str, source: str | None = None, *, verify: bool = False
    ) -> "ShardSet":
        """Open a split after checking that every file of it is there.

        The size of a file is compared here too when files are few, and in any case before its
        first byte is read.

        Args:
            directory: A directory that data_prep/shard.py made.
            split: "train" or "validation".
            source: Only the documents of this source; None = of all.
            verify: Also compare all checksums (reads every file once).

        Raises:
            DataError: The set is missing, incomplete, damaged, or has no such split or source.
        """
        directory = Path(directory)
        manifest = load_manifest(directory)
        if split not in manifest.splits:
            raise DataError(
                f"{directory} has no split {split!r}; it has {', '.join(manifest.splits)}"
            )
        names = dict.fromkeys(shard.source for shard in manifest.shards)
        if source is not None and source not in names:
            raise DataError(f"{directory} has no source {source!r}; it has {', '.join(names)}")
        shards = cls(directory, split, manifest, source)
        shards._files.check()
        shards._check_tokenizer()
        if verify:
            shards.verify()
        return shards

    def of_source(self, source: str) -> "ShardSet":
        """The stream of one source of this split; it shares the open files of this one."""
        assert source in self.sources, (source, self.sources)
        return ShardSet(self.directory, self.split, self.manifest, source, self)

    @property
    def vocab_size(self) -> int:
        """Size of the tokenizer's vocabulary."""
        return self.manifest.tokenizer.vocab_size

    @property
    def max_token_id(self) -> int:
        """The largest id the tokenizer can give."""
        return self.manifest.tokenizer.max_token_id

    @property
    def eos_id(self) -> int:
        """The id that ends each document."""
        return self.manifest.tokenizer.eos_id

    @property
    def tokenizer_sha256(self) -> str:
        """sha256 of tokenizer.json."""
        return self.manifest.tokenizer.sha256

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer.json the shards were made with."""
        return self.directory / TOKENIZER

    def open_tokenizer(self) -> Tokenizer:
        """The tokenizer the shards were made with.

        Raises:
            DataError: It cannot be read.
        """
        known = self.manifest.tokenizer
        content = read_bounded(self.tokenizer_path, TOKENIZER_BYTES)
        path = os.fspath(self.tokenizer_path)
        return Tokenizer(content, known.eos_token, path, self.manifest.special_tokens)

    def read(self, start: int, count: int) -> TokenArray:
        """Read tokens [start, start + count) of the stream, across shard borders.

        Returns:
            A new array of `count` ids, uint16 or uint32 as stored.

        Raises:
            DataError: A file cannot be read or ends early.
        """
        out: TokenArray = np.empty(count, dtype=self.dtype)
        self.read_into(start, out)
        return out

    def read_into(self, start: int, out: TokenArray) -> None:
        """Fill `out` (contiguous, of this set's dtype) with the tokens from `start` on.

        Raises:
            DataError: A file cannot be read or ends early.
        """
        count = len(out)
        assert 0 <= start <= start + count <= self.num_tokens, (start, count, self.num_tokens)
        itemsize = self.dtype.itemsize
        view = out.view(np.uint8).data
        number = bisect_right(self._starts, start) - 1
        while view:
            shard = self.shards[number]
            first = start - self._starts[number]
            size = min(len(view), (shard.tokens - first) * itemsize)
            position = shard.values_offset + first * itemsize
            self._files.read(self._numbers[number], view[:size], position)
            view = view[size:]
            start += size // itemsize
            number += 1

    def read_many(self, starts: Sequence[int], outs: Sequence[TokenArray]) -> None:
        """Fill each of `outs` as `read_into` does; a batch at once takes less time.

        Raises:
            DataError: A file cannot be read or ends early.
        """
        starting, bases, numbers = self._starts, self._bases, self._numbers
        descriptors, itemsize, read = self._files.descriptors, self.dtype.itemsize, os.preadv
        remaining = []
        with self._files.lock:
            for start, out in zip(starts, outs, strict=True):
                number = bisect_right(starting, start) - 1
                try:
                    position = bases[number] + start * itemsize
                    size = read(descriptors[numbers[number]], [out], position)  # type: ignore[list-item]
                except OSError:
                    size = 0
                if size != out.nbytes or start + len(out) > starting[number + 1]:
                    remaining.append((start, out))
        # Files that are not open, reads over a shard's border, and whatever failed.
        for start, out in remaining:
            self.read_into(start, out)

    def read_targets(self, start: int, out: NDArray[np.bool_]) -> None:
        """Fill `out` with which of the tokens from `start` on may be targets.

        Raises:
            DataError: A file cannot be read or ends early.
        """
        assert 0 <= start <= start + len(out) <= self.num_tokens, (start, len(out))
        number, done = bisect_right(self._starts, start) - 1, 0
        while done < len(out):
            shard, first = self.shards[number], start + done - self._starts[number]
            count = min(len(out) - done, shard.tokens - first)
            part = out[done : done + count]
            if shard.targets is None:
                part[:] = True
            else:
                bits = np.empty(-(-(first + count) // 8) - first // 8, np.uint8)
                position = shard.targets.offset + first // 8
                self._files.read(self._numbers[number], bits.data, position)
                unpacked = np.unpackbits(bits, bitorder="little")
                part[:] = unpacked[first % 8 : first % 8 + count]
            done += count
            number += 1

    def document_starts(self, start: int, count: int) -> NDArray[np.int64]:
        """Where documents start within tokens [start, start + count) of the stream.

        Found in the shards' offsets, of which a few pages are read, and not by looking for
        end-of-document tokens.

        Returns:
            Positions in the stream, rising.

        Raises:
            DataError: A file cannot be read or ends early.
        """
        end = start + count
        assert 0 <= start <= end <= self.num_tokens, (start, count, self.num_tokens)
        found: list[NDArray[np.int64]] = []
        number = bisect_right(self._starts, start) - 1
        while start < end:
            base = self._starts[number]
            last = min(end - base, self.shards[number].tokens)
            found.append(self._starts_in_shard(number, start - base, last) + base)
            start = base + last
            number += 1
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def document_lengths(self) -> NDArray[np.int64]:
        """Tokens of every document of the stream, end-of-document tokens included."""
        parts = [self.lengths_in_shard(number) for number in range(len(self.shards))]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def lengths_in_shard(self, number: int) -> NDArray[np.int64]:
        """Tokens of every document of one shard."""
        return np.diff(self._offsets(number, 0, self.shards[number].rows + 1))

    def verify(self) -> None:
        """Compare the checksum of every file of this stream, whole.

        Raises:
            DataError: Naming the first damaged file.
        """
        for shard in self.shards:
            path = self.directory / shard.path
            digest = xxhash.xxh3_128()
            try:
                check_regular(path)
                with path.open("rb") as file:
                    while block := file.read(CHECKSUM_BLOCK_BYTES):
                        digest.update(block)
            except OSError as error:
                raise DataError(f"cannot read {path}: {error.strerror or error}") from error
            if digest.hexdigest() != shard.file_xxh3_128:
                raise DataError(
                    f"{path} is damaged: its checksum is {digest.hexdigest()}, the manifest says "
                    f"{printable(shard.file_xxh3_128)}; delete it and run the same "
                    "data_prep/shard.py command again"
                )

    def close(self) -> None:
        """Close all files; they open again when read."""
        self._files.close()

    def _check_tokenizer(self) -> None:
        try:
            content = read_bounded(self.tokenizer_path, TOKENIZER_BYTES)
        except OSError as error:
            raise DataError(
                f"{self.tokenizer_path} is missing ({error.strerror}); copy the set again"
            ) from error
        if hashlib.sha256(content).hexdigest() != self.tokenizer_sha256:
            raise DataError(
                f"{self.tokenizer_path} is not the tokenizer the shards were made with; copy the "
                "set again"
            )

    def _offsets(self, number: int, first: int, count: int) -> NDArray[np.int64]:
        """Entries [first, first + count) of a shard's offsets: document r is [r] to [r + 1].

        Raises:
            DataError: They cannot be read, or are no offsets.
        """
        out = np.empty(count, np.int64)
        shard = self.shards[number]
        position = shard.offsets_offset + first * out.itemsize
        self._files.read(self._numbers[number], out.view(np.uint8).data, position)
        # Wrong ones would be trusted: a search among them need not end, and a length be anything.
        first_is_wrong = first == 0 and out[0] != 0
        last_is_wrong = first + count == shard.rows + 1 and out[-1] != shard.tokens
        if first_is_wrong or last_is_wrong or bool((out[1:] <= out[:-1]).any()):
            raise DataError(
                f"{self.directory / shard.path}: the starts of its documents do not rise from 0 to "
                f"its {shard.tokens:,} tokens; copy the set again, or delete this file and run the "
                "same data_prep/shard.py command again"
            )
        return out

    def _starts_in_shard(self, number: int, first: int, end: int) -> NDArray[np.int64]:
        """Document starts in tokens [first, end) of a shard."""
        documents = self.shards[number].rows
        document, block = self._block_at(number, first)
        found: list[NDArray[np.int64]] = []
        while True:
            low, high = np.searchsorted(block, (first, end))
            found.append(block[low:high])
            document += len(block)
            if document >= documents or block[-1] >= end:
                return found[0] if len(found) == 1 else np.concatenate(found)
            count = min(OFFSETS_PER_READ, documents - document)
            block = self._offsets(number, document, count)

    def _block_at(self, number: int, token: int) -> tuple[int, NDArray[np.int64]]:
        """A block of offsets that begins at or before the document of `token`, and its first one.

        Guesses from the average length, then halves, in turn: a few reads for even lengths, and
        twice the logarithm of the number of documents for any.
        """
        documents = self.shards[number].rows
        base = self.shards[number].offsets_offset // 8
        low, high = 0, documents
        low_token, high_token = 0, self.shards[number].tokens
        guessing = True
        while high - low >= OFFSETS_PER_READ:
            share = (token - low_token) / (high_token - low_token) if guessing else 0.5
            guessing = not guessing
            first = low + int((high - low) * share) - OFFSETS_PER_READ // 2
            first = min(max(first, low), high - OFFSETS_PER_READ + 1)
            # A block that fills a page of the file is one page read from the disk, not two.
            past_page = (base + first) % OFFSETS_PER_READ
            first = first - past_page if first - past_page >= low else first
            block = self._offsets(number, first, OFFSETS_PER_READ)
            if block[0] > token:
                high, high_token = first, int(block[0])
            elif block[-1] <= token:
                low, low_token = first + len(block) - 1, int(block[-1])
            else:
                return first, block
        return low, self._offsets(number, low, min(OFFSETS_PER_READ, documents - low))
