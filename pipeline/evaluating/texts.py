"""The texts of an evaluation by kind, as tokens: from shards, or from files.

A kind is a source of a shard set, a file, or what a key of JSON lines says. Its tokens are one
stream when the model was trained across the ends of documents, each document then ended by the
token that ends it; else each document is a stream of its own, which the model's beginning of text
begins, if it has one. Of prompts and completions, only completions are targets, as in training.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from numpy.typing import NDArray

from data_prep.shards.shard_set import ShardSet
from foundation.json_lines import read_json_lines, read_plain
from foundation.shown_text import printable, reason
from model.errors import ConfigError
from pipeline.evaluating.model_folder import EvaluatedModel

Stream = NDArray[Any]  # uint16 or uint32
_JSON_LINES = (".jsonl", ".ndjson")
_BATCH = 1024  # documents that are encoded at once
_MOST_KINDS = 1000


class Marks(NamedTuple):
    """Which tokens of a stream may be targets, and of which positions.

    Attributes:
        targets: `[tokens]` bool: false for those of prompts.
        documents: `[tokens]` numbers: a target is of the position's own document.
    """

    targets: NDArray[np.bool_]
    documents: NDArray[np.int64]

    def part(self, start: int, end: int) -> "Marks":
        """Those of the tokens from `start` on, before `end`."""
        return Marks(self.targets[start:end], self.documents[start:end])

    def allow(self, first: int, head: int, count: int) -> NDArray[np.bool_]:
        """Whether the positions from `first` on have a target of a head, `[count]`."""
        ahead = slice(first + head, first + head + count)
        same = self.documents[ahead] == self.documents[first : first + count]
        return self.targets[ahead] & same


class TextKind(NamedTuple):
    """Texts whose figures go together.

    Attributes:
        name: the kind.
        documents: how many, the last one maybe in part.
        streams: tokens; all documents in one, or one for each.
        marks: of each stream; None = every token is a target, of any position before it.
    """

    name: str
    documents: int
    streams: list[Stream]
    marks: list[Marks] | None = None


def of_shards(
    model: EvaluatedModel, directory: Path, split: str, *, joined: bool, max_tokens: int | None
) -> list[TextKind]:
    """The sources of a split of a shard set.

    Args:
        model: whose tokenizer the shards must be of.
        directory: the set.
        split: `validation` or `train`.
        joined: whether all documents make one stream.
        max_tokens: of each source, from its first; None = all.

    Raises:
        DataError: the set is damaged, or has no such split.
        ConfigError: it is of another tokenizer.
    """
    shards = ShardSet.open(directory, split)
    _check_tokenizer(model, shards)
    if shards.num_tokens == 0:
        raise ConfigError(
            f"--split {split} of {directory} holds no document; make the shards again with a "
            "larger --validation-fraction, or give --text"
        )
    kinds = []
    for source in shards.sources:
        stream = shards.of_source(source)
        count = stream.num_tokens
        if max_tokens is not None:
            # Targets of the last ones, and the token that is only context of the first.
            count = min(count, max_tokens + model.network.num_heads)
        tokens = stream.read(0, count)
        starts = stream.document_starts(0, count)
        marks = _marks(stream, count, starts) if stream.has_targets else None
        if joined:
            whole = None if marks is None else [marks]
            kinds.append(TextKind(source, len(starts), [tokens], whole))
        else:
            documents = _begun(model, np.split(tokens, starts[1:]))
            kinds.append(
                TextKind(source, len(starts), documents, _begun_marks(model, marks, starts))
            )
    shards.close()
    return kinds


def of_files(
    model: EvaluatedModel, files: Sequence[Path], *, joined: bool, text_key: str, kind_key: str
) -> list[TextKind]:
    """Files of text, one document each, and of JSON lines, a document a line.

    Args:
        model: its tokenizer encodes them.
        files: which; names that end in .gz are decompressed.
        joined: whether all documents of a kind make one stream.
        text_key: of JSON lines, where the text is.
        kind_key: of JSON lines, what kind it is; the file's name for lines without it.

    Raises:
        ConfigError: a file cannot be read, naming its line.
    """
    if joined and model.end is None:
        raise ConfigError(
            f"--documents joined, but {model.directory} has no token that ends a document "
            "(eos_token_id in its config.json); leave it out, or give --documents apart"
        )
    if twice := next((path for path in files if files.count(path) > 1), None):
        raise ConfigError(f"--text {twice} is given twice; give each file once")
    by_kind: dict[str, list[str]] = {}
    for path in files:
        for kind, text in _documents_of(path, text_key, kind_key):
            by_kind.setdefault(kind, []).append(text)
    if len(by_kind) > _MOST_KINDS:
        raise ConfigError(
            f"--kind-key {printable(kind_key)} gives {len(by_kind):,} kinds of text, more than "
            f"{_MOST_KINDS:,}; name a key with fewer values"
        )
    kinds = []
    for name, texts in by_kind.items():
        documents = list(_encode(model, texts))
        streams = [np.concatenate(documents)] if joined else _begun(model, documents)
        kinds.append(TextKind(name, len(documents), streams))
    return kinds


def _check_tokenizer(model: EvaluatedModel, shards: ShardSet) -> None:
    """See that ids mean the same; the rest of the files may differ."""
    theirs = tokenizers.Tokenizer.from_file(str(shards.tokenizer_path))
    if theirs.get_vocab() != model.tokenizer.get_vocab():
        raise ConfigError(
            f"{shards.directory} was made with another tokenizer than that of {model.directory}, "
            "so their ids differ; make the shards again with --tokenizer "
            f"{model.directory}/tokenizer.json, or give the text itself by --text"
        )


def _begun(model: EvaluatedModel, documents: Sequence[Stream]) -> list[Stream]:
    """Each document with the model's beginning of text before it, if it has one."""
    if model.begin is None:
        return list(documents)
    return [np.insert(document, 0, model.begin) for document in documents]


def _marks(stream: ShardSet, count: int, starts: NDArray[np.int64]) -> Marks:
    """What a source of prompts and completions says of its first tokens."""
    targets = np.empty(count, np.bool_)
    stream.read_targets(0, targets)
    begins = np.zeros(count, np.int64)
    begins[starts] = 1
    return Marks(targets, begins.cumsum())


def _begun_marks(
    model: EvaluatedModel, marks: Marks | None, starts: NDArray[np.int64]
) -> list[Marks] | None:
    """The marks of each document, as `_begun` begins it."""
    if marks is None:
        return None
    ends = [*starts[1:].tolist(), len(marks.targets)]
    parts = [marks.part(*ends_of) for ends_of in zip(starts.tolist(), ends, strict=True)]
    if model.begin is None:
        return parts
    return [
        Marks(np.insert(part.targets, 0, False), np.insert(part.documents, 0, part.documents[0]))
        for part in parts
    ]


def _encode(model: EvaluatedModel, texts: Sequence[str]) -> Iterator[Stream]:
    ending = [] if model.end is None else [model.end]
    dtype = np.uint16 if model.network.config.vocab_size <= 1 << 16 else np.uint32
    for first in range(0, len(texts), _BATCH):
        part = list(texts[first : first + _BATCH])
        for encoding in model.tokenizer.encode_batch_fast(part, add_special_tokens=False):
            yield np.array(encoding.ids + ending, dtype)


def _documents_of(path: Path, text_key: str, kind_key: str) -> Iterable[tuple[str, str]]:
    """Kind and text of each document of a file, without empty ones."""
    plain_name = path.name.lower().removesuffix(".gz")
    try:
        if plain_name.endswith(_JSON_LINES):
            found = [
                _of_line(line.value, line.number, path.name, text_key, kind_key)
                for line in read_json_lines(path)
            ]
        else:
            found = [(path.name, read_plain(path).decode("utf-8"))]
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--text {path}: {reason(error)}; give UTF-8 text, or JSON lines with a text under "
            f"{printable(text_key)!r} (--text-key)"
        ) from error
    return [(kind, text) for kind, text in found if text]


def _of_line(
    value: dict[str, Any], number: int, name: str, text_key: str, kind_key: str
) -> tuple[str, str]:
    text, kind = value.get(text_key), value.get(kind_key, name)
    if not isinstance(text, str):
        keys = ", ".join(value)
        raise ValueError(f"line {number} has no text under {text_key!r}, only {keys or 'no key'}")
    if not isinstance(kind, str):
        raise ValueError(f"line {number} has no text under {kind_key!r} (--kind-key)")
    return printable(kind), text
