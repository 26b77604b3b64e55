"""A finished shard set, read as one stream of tokens with `preadv` at the recorded offsets."""

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.errors import DataError
from data_prep.manifest import TOKENIZER, Manifest, ShardEntry, load_manifest
from data_prep.tokenizer import TokenArray

MAX_OPEN_FILES = 64
CHECKSUM_BLOCK_BYTES = 1 << 22


class ShardSet:
    """One split of a shard set; made by `ShardSet.open`.

    The token stream is the shards in manifest order, documents end to end. Nothing is mapped and
    nothing but the manifest is kept in memory. Safe to share between threads.

    Attributes:
        directory: Where the set lies.
        split: "train" or "validation".
        manifest: The whole manifest.
        fingerprint: Changes when the token order of this split changes.
        num_tokens: Length of the stream.
        total_bytes: Size of the split's files.
    """

    def __init__(self, directory: Path, split: str, manifest: Manifest) -> None:
        totals = manifest.splits[split]
        self.directory = directory
        self.split = split
        self.manifest = manifest
        self.fingerprint: str = totals.fingerprint
        self.num_tokens: int = totals.tokens
        self.total_bytes: int = totals.bytes
        self._shards: Sequence[ShardEntry] = [
            shard for shard in manifest.shards if shard.split == split
        ]
        sizes = [shard.tokens for shard in self._shards]
        self._starts: NDArray[np.int64] = np.cumsum([0, *sizes], dtype=np.int64)
        self._dtype: np.dtype[Any] = (
            np.dtype(np.uint16) if manifest.dtype == "uint16" else np.dtype(np.uint32)
        )
        self._files: OrderedDict[int, int] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, directory: Path | str, split: str, *, verify: bool = False) -> "ShardSet":
        """Open a split after checking that every file of it is there in full size.

        Args:
            directory: A directory that data_prep/shard.py made.
            split: "train" or "validation".
            verify: Also compare all checksums (reads every file once).

        Raises:
            DataError: The set is missing, incomplete, damaged, or has no such split.
        """
        directory = Path(directory)
        manifest = load_manifest(directory)
        if split not in manifest.splits:
            raise DataError(
                f"{directory} has no split {split!r}; it has {', '.join(manifest.splits)}"
            )
        shards = cls(directory, split, manifest)
        shards._check_files()
        if verify:
            shards.verify()
        return shards

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

    def read(self, start: int, count: int) -> TokenArray:
        """Read tokens [start, start + count) of the stream, across shard borders.

        Returns:
            A new array of `count` ids, uint16 or uint32 as stored.

        Raises:
            DataError: A file cannot be read or ends early.
        """
        assert 0 <= start <= start + count <= self.num_tokens, (start, count, self.num_tokens)
        out: TokenArray = np.empty(count, dtype=self._dtype)
        done = 0
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        while done < count:
            first = start + done - int(self._starts[number])
            length = min(count - done, self._shards[number].tokens - first)
            self._read_shard(number, first, out[done : done + length])
            done += length
            number += 1
        return out

    def verify(self) -> None:
        """Compare the checksum of every file of this split, whole.

        Raises:
            DataError: Naming the first damaged file.
        """
        for shard in self._shards:
            path = self.directory / shard.path
            digest = xxhash.xxh3_128()
            try:
                with path.open("rb") as file:
                    while block := file.read(CHECKSUM_BLOCK_BYTES):
                        digest.update(block)
            except OSError as error:
                raise DataError(f"cannot read {path}: {error.strerror or error}") from error
            if digest.hexdigest() != shard.file_xxh3_128:
                raise DataError(
                    f"{path} is damaged: its checksum is {digest.hexdigest()}, the manifest says "
                    f"{shard.file_xxh3_128}; delete it and run the same data_prep/shard.py command "
                    "again"
                )

    def close(self) -> None:
        """Close all files; they open again when read."""
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])

    def _check_files(self) -> None:
        for shard in self._shards:
            path = self.directory / shard.path
            try:
                size = path.stat().st_size
            except OSError as error:
                raise DataError(
                    f"{path} is missing ({error.strerror}); run the same data_prep/shard.py "
                    "command again to make it, or copy the set again"
                ) from error
            if size != shard.bytes:
                raise DataError(
                    f"{path} has {size:,} bytes, the manifest says {shard.bytes:,}; run the same "
                    "data_prep/shard.py command again to make it anew, or copy the set again"
                )
        try:
            content = self.tokenizer_path.read_bytes()
        except OSError as error:
            raise DataError(
                f"{self.tokenizer_path} is missing ({error.strerror}); copy the set again"
            ) from error
        if hashlib.sha256(content).hexdigest() != self.tokenizer_sha256:
            raise DataError(
                f"{self.tokenizer_path} is not the tokenizer the shards were made with; copy the "
                "set again"
            )

    def _read_shard(self, number: int, first: int, out: TokenArray) -> None:
        """Fill `out` with tokens of one shard from its token `first` on."""
        shard = self._shards[number]
        view = out.view(np.uint8).data
        position = shard.values_offset + first * self._dtype.itemsize
        # The lock keeps another thread from closing the descriptor in between.
        with self._lock:
            try:
                descriptor = self._descriptor(number)
                while view:
                    size = os.preadv(descriptor, [view], position)
                    if size == 0:
                        raise DataError(
                            f"{self.directory / shard.path} ends at byte {position:,}; it was cut "
                            "while in use: copy the set again"
                        )
                    view = view[size:]
                    position += size
            except OSError as error:
                raise DataError(
                    f"cannot read {self.directory / shard.path}: {error.strerror or error}"
                ) from error

    def _descriptor(self, number: int) -> int:
        """An open file of a shard; the least recently used one is closed to stay in bounds."""
        if number in self._files:
            self._files.move_to_end(number)
        else:
            if len(self._files) >= MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[number] = os.open(self.directory / self._shards[number].path, os.O_RDONLY)
        return self._files[number]
