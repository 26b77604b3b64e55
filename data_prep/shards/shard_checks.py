"""What can be wrong with one shard that its checksum does not show."""

import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.conversations.forms import ChatForm
from data_prep.conversations.marks import plain_text
from data_prep.inputs.input_files import InputFile
from data_prep.inputs.reading import TextReader
from data_prep.inputs.records import LARGEST_DOCUMENT_BYTES, Reading
from data_prep.shards.arrow_file import ShardRows, read_shard
from data_prep.shards.manifest import InputEntry, Manifest, ShardEntry
from data_prep.tokenization.tokenizer import Tokenizer
from foundation.durable_files import read_entry

LARGEST_SAMPLED_TOKENS = 1 << 20
COMPARED_BYTES = 1 << 22


class ShardChecks:
    """Checks shards one after the other, and counts their documents.

    Args:
        directory: The shard set.
        manifest: Its manifest.
        tokenizer: Its tokenizer; None = nothing can be decoded.
        stride: One document in so many is decoded back.

    Attributes:
        documents: Documents found so far of each input file.
        is_complete: Whether all documents so far could be counted.
    """

    def __init__(
        self, directory: Path, manifest: Manifest, tokenizer: Tokenizer | None, stride: int
    ) -> None:
        self._directory = directory
        self._manifest = manifest
        self._tokenizer = tokenizer
        self._stride = stride
        self.documents: Counter[int] = Counter()
        self.is_complete = True
        self._texts = TextReader()

    def find_problems(self, shard: ShardEntry) -> Iterator[str]:
        """Yield one line for each thing that is wrong with a shard."""
        path = self._directory / shard.path
        if problem := _file_problem(path, shard):
            # Every other difference follows from the damage, and its bytes cannot be trusted.
            self.is_complete = False
            yield f"{path} {problem}; delete it and run the same data_prep/shard.py command again"
            return
        try:
            yield from self._shard_problems(path, shard)
        except (OSError, ValueError, LookupError, ArithmeticError, MemoryError) as error:
            self.is_complete = False
            yield f"{path}: not a shard ({error})"

    def _shard_problems(self, path: Path, shard: ShardEntry) -> Iterator[str]:
        """What is wrong with a file that is the one of the manifest."""
        rows, metadata = read_shard(path)
        for key, expected in (
            ("tokenizer_sha256", self._manifest.tokenizer.sha256),
            ("split", shard.split),
            ("source", shard.source),
        ):
            if metadata.get(key) != expected:
                yield f"{path}: its {key} is {metadata.get(key)}, the manifest says {expected}"
        unreadable = False
        for problem in (*self._layout_problems(rows, shard), *_target_problems(path, rows, shard)):
            unreadable = True
            yield f"{path}: {problem}"
        if not unreadable:
            for problem in self._content_problems(rows, shard):
                yield f"{path}: {problem}"

    def _layout_problems(self, rows: ShardRows, shard: ShardEntry) -> Iterator[str]:
        if (len(rows.src), len(rows.tokens)) != (shard.rows, shard.tokens):
            yield (
                f"{len(rows.src):,} rows and {len(rows.tokens):,} tokens, the manifest says "
                f"{shard.rows:,} and {shard.tokens:,}"
            )
            return
        if str(rows.tokens.dtype) != self._manifest.dtype:
            yield f"tokens are {rows.tokens.dtype}, the manifest says {self._manifest.dtype}"
            return
        lengths = np.diff(rows.offsets)
        if rows.offsets[0] != 0 or rows.offsets[-1] != shard.tokens or bool((lengths < 1).any()):
            yield f"the documents' offsets do not rise from 0 to {shard.tokens:,}"
        path = self._directory / shard.path
        if not _is_at(path, shard.values_offset, rows.tokens):
            yield f"the tokens are not at byte {shard.values_offset:,}"
        if not _is_at(path, shard.offsets_offset, rows.offsets):
            yield f"the offsets are not at byte {shard.offsets_offset:,}"

    def _content_problems(self, rows: ShardRows, shard: ShardEntry) -> Iterator[str]:
        known, inputs = self._manifest.tokenizer, self._manifest.inputs
        if not shard.rows:
            return
        if int(rows.tokens.max()) > known.max_token_id:
            yield f"id {rows.tokens.max()} is above {known.max_token_id}"
            return
        ends = rows.tokens[rows.offsets[1:] - 1]
        num_eos = int(np.count_nonzero(rows.tokens == known.eos_id))
        strays = num_eos - shard.rows
        # Only where text may become a special token can a document hold that id inside.
        if (
            strays < 0
            or (strays and not self._may_hold_ends(shard))
            or not bool((ends == known.eos_id).all())
        ):
            yield f"{num_eos:,} end-of-document tokens for {shard.rows:,} documents"
        if int(rows.src.max()) >= len(inputs):
            yield f"names input {rows.src.max()} of {len(inputs)}"
            return
        for number, count in zip(*np.unique(rows.src, return_counts=True), strict=True):
            self.documents[int(number)] += int(count)
            source = inputs[number].source
            if source and source != shard.source:
                yield f"holds documents of {inputs[number].path}, which is of source {source}"
        for row in range(0, shard.rows, self._stride):
            if not self._decodes_back(rows, row):
                yield f"document {row} does not decode back to its text"

    def _decodes_back(self, rows: ShardRows, row: int) -> bool:
        """Compare a document with its input, or, if that is gone, with itself encoded again."""
        ids = rows.tokens[rows.offsets[row] : rows.offsets[row + 1] - 1]
        if (
            self._tokenizer is None
            or self._tokenizer.why_lossy
            or len(ids) > LARGEST_SAMPLED_TOKENS
        ):
            return True
        text = self._tokenizer.decode(ids)
        entry = self._manifest.inputs[int(rows.src[row])]
        original = self._input_text(entry, int(rows.row[row]))
        if original is not None:
            return original == text.encode()
        if self._manifest.form_of(entry) is not None:
            return True  # of the decoded text it is not known where its parts begin
        again, _ = self._tokenizer.encode_documents([text])
        return bool(np.array_equal(again[:-1], ids))

    def _may_hold_ends(self, shard: ShardEntry) -> bool:
        """Whether a document may hold the end-of-document token inside, as one of many turns."""
        chats = {
            source.name for source in self._manifest.sources if isinstance(source.form, ChatForm)
        }
        return self._manifest.special_tokens == "id" or shard.source in chats

    def _input_text(self, entry: InputEntry, offset: int) -> bytes | None:
        """The text of a document in its input file; None when it cannot be had quickly."""
        file = InputFile(entry.path, entry.kind, entry.bytes, entry.mtime_ns)
        form, text_key = self._manifest.form_of(entry), self._manifest.text_key_of(entry)
        if isinstance(form, ChatForm):
            return None  # a template is a program, and that of a set may be anybody's
        reading = Reading(text_key, max(entry.bytes, LARGEST_DOCUMENT_BYTES), form)
        text = self._texts.read(file, offset, reading)
        return plain_text(text) if form and text is not None else text


def _target_problems(path: Path, rows: ShardRows, shard: ShardEntry) -> Iterator[str]:
    """What is wrong with the column of targets, in a file that has the tokens of the manifest."""
    known = shard.targets
    if (rows.targets is None) != (known is None):
        says = "no" if known is None else "a"
        yield f"the manifest says {says} column of targets"
    elif known is not None and rows.targets is not None:
        count = int(np.count_nonzero(rows.targets))
        if count != known.count:
            yield f"{count:,} tokens are targets, the manifest says {known.count:,}"
        bits = np.packbits(rows.targets, bitorder="little")
        if not _is_at(path, known.offset, bits):
            yield f"the targets are not at byte {known.offset:,}"


def _file_problem(path: Path, shard: ShardEntry) -> str:
    """How a file differs from the one that the manifest describes; empty when it does not."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return "is not a regular file"
        if status.st_size != shard.bytes:
            return f"has {status.st_size:,} bytes, the manifest says {shard.bytes:,}"
        checksum = read_entry(path, from_disk=False).xxh3
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    if checksum != shard.file_xxh3_128:
        return (
            f"is damaged: its checksum is {checksum}, the manifest says {shard.file_xxh3_128[:80]}"
        )
    return ""


def _is_at(path: Path, position: int, expected: NDArray[Any]) -> bool:
    """Whether the bytes of an array are in a file at a byte offset; read block by block."""
    wanted = expected.view(np.uint8)
    with path.open("rb") as file:
        file.seek(position, os.SEEK_SET)
        for start in range(0, len(wanted), COMPARED_BYTES):
            part = wanted[start : start + COMPARED_BYTES]
            if file.read(len(part)) != part.tobytes():
                return False
    return True
