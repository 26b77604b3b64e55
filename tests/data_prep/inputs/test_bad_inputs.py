"""Twenty good documents and one bad thing: all twenty are in the shards, the ledger adds up."""

import gzip
import json
import lzma
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd

from data_prep.errors import DataError
from data_prep.shards.manifest import Manifest
from data_prep.shards.shard_set import ShardSet
from data_prep.verify import find_problems

Build = Callable[..., Manifest]

DOCUMENTS = [f"document {number}: naïve {'word ' * number}" for number in range(20)]
RECORDS = [json.dumps({"text": text}) for text in DOCUMENTS]
LINES = [record.encode() for record in RECORDS]


def with_line(line: bytes) -> bytes:
    """The bad line between the tenth and the eleventh good one."""
    return b"\n".join([*LINES[:10], line, *LINES[10:]]) + b"\n"


def halves() -> tuple[bytes, bytes]:
    """The good lines in two files' worth."""
    return b"\n".join(LINES[:10]) + b"\n", b"\n".join(LINES[10:]) + b"\n"


def noise(size: int) -> bytes:
    """A last line that compresses badly, so that a cut at the end of a file lies inside it."""
    numbers = (number * 2654435761 % 4294967291 for number in range(size))
    return json.dumps({"text": " ".join(map(str, numbers))}).encode()


@dataclass(frozen=True)
class Case:
    """A file, and what becomes of it beside the twenty documents."""

    name: str
    content: bytes
    rejects: dict[str, int] = field(default_factory=dict)
    empty: int = 0
    extra: tuple[str, ...] = ()


ENDLESS = b"\n".join([*LINES, noise(40_000)]) + b"\n"
PRETTY = json.dumps([{"text": text, "id": {"n": [1, 2]}} for text in DOCUMENTS], indent=2).encode()
CASES = {
    "invalid UTF-8": Case("a.jsonl", with_line(b'{"text": "\xff"}'), {"not UTF-8": 1}),
    "lone surrogate": Case("a.jsonl", with_line(b'{"text": "\\ud800"}'), {"lone surrogate": 1}),
    "missing text": Case("a.jsonl", with_line(b'{"txt": "x"}'), {"no 'text'": 1}),
    "null": Case("a.jsonl", with_line(b'{"text": null}'), {"'text' is not a string": 1}),
    "number": Case("a.jsonl", with_line(b'{"text": 42}'), {"'text' is not a string": 1}),
    "empty text": Case("a.jsonl", with_line(b'{"text": ""}'), empty=1),
    "blank line": Case("a.jsonl", with_line(b" "), empty=1),
    "malformed": Case("a.jsonl", with_line(b'{"text": "x'), {"malformed JSON": 1}),
    "two on a line": Case("a.jsonl", with_line(b"{} {}"), {"malformed JSON": 1}),
    "cut last line": Case("a.jsonl", with_line(b"")[:-1] + b'\n{"te', {"malformed JSON": 1}, 1),
    "no last line end": Case("a.jsonl", b"\n".join(LINES)),
    "BOM and CRLF": Case("a.jsonl", b"\xef\xbb\xbf" + b"\r\n".join(LINES) + b"\r\n"),
    "carriage returns": Case("a.jsonl", b"\r".join(LINES)),
    "two files with BOM joined": Case(
        "a.jsonl", b"".join(b"\xef\xbb\xbf" + half for half in halves())
    ),
    "special token": Case(
        "a.jsonl", with_line(b'{"text": "<|endoftext|>"}'), extra=("<|endoftext|>",)
    ),
    "multi-member gz": Case("a.jsonl.gz", b"".join(map(gzip.compress, halves()))),
    "multi-frame zst": Case("a.jsonl.zst", b"".join(map(zstd.compress, halves()))),
    "multi-stream xz": Case("a.ndjson.xz", b"".join(map(lzma.compress, halves()))),
    "truncated gz": Case("a.jsonl.gz", gzip.compress(ENDLESS)[:-900], {"truncated .gz": 1}),
    "truncated zst": Case("a.jsonl.zst", zstd.compress(ENDLESS)[:-900], {"truncated .zst": 1}),
    "truncated xz": Case("a.jsonl.xz", lzma.compress(ENDLESS)[:-900], {"truncated .xz": 1}),
    "gz without its last bytes": Case(
        "a.jsonl.gz", gzip.compress(b"\n".join(LINES))[:-8], {"truncated .gz": 1}
    ),
    "gz with a wrong sum": Case(
        "a.jsonl.gz",
        gzip.compress(b"\n".join(LINES))[:-8] + b"wrongsum",
        {"damaged .gz (Error -3 while decompressing data: incorrect data check)": 1},
    ),
    "gz and garbage": Case(
        "a.jsonl.gz",
        gzip.compress(b"\n".join(LINES)) + b"garbage",
        {"damaged .gz (Error -3 while decompressing data: incorrect header check)": 1},
    ),
    "pretty array": Case("a.json", PRETTY),
    "array of strings": Case("a.json", json.dumps(DOCUMENTS).encode()),
    "compressed array": Case("a.json.gz", gzip.compress(PRETTY)),
    "array on one line": Case("a.json", b"[" + b",".join(LINES) + b"]"),
    "array with a bad value": Case(
        "a.json", PRETTY.replace(b"\n]", b',\n  {"text": }\n]'), {"malformed JSON": 1}
    ),
    "array with an open string": Case(
        "a.json", PRETTY.replace(b"[\n", b'[\n  {"text": "x\n  },\n', 1), {"malformed JSON": 1}
    ),
    "array without its end": Case(
        "a.json", PRETTY[: PRETTY.rindex(b"]")] + b',{"text": "cu', {"malformed JSON": 1}
    ),
    "lines in a .json": Case("a.json", with_line(b'{"text": "x'), {"malformed JSON": 1}),
    "objects in a row": Case(
        "a.json", "\n".join(json.dumps({"text": text}, indent=1) for text in DOCUMENTS).encode()
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_no_good_document_is_lost(tmp_path: Path, build_set: Build, name: str) -> None:
    """The twenty are stored in order, the bad thing is counted by its reason, the set verifies."""
    case = CASES[name]
    path = tmp_path / case.name
    path.write_bytes(case.content)
    manifest = build_set(path, validation_fraction=0, max_bad_fraction=1)
    (entry,) = manifest.inputs
    ledger = entry.ledger
    assert ledger.rejects_by_reason == case.rejects
    assert ledger.documents == len(DOCUMENTS) + len(case.extra)
    assert ledger.empty == case.empty
    assert ledger.records == ledger.documents + ledger.empty + ledger.rejects
    assert stored(tmp_path / "out") == sorted([*DOCUMENTS, *case.extra])
    assert list(find_problems(tmp_path / "out")) == []
    listed = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").open()]
    assert [reject["reason"] for reject in listed] == list(case.rejects)
    assert all(reject["file"] == str(path) for reject in listed)


def stored(directory: Path) -> list[str]:
    """The documents of a set of the byte tokenizer, sorted."""
    with_ends = ShardSet.open(directory, "train")
    tokens = with_ends.read(0, with_ends.num_tokens).tolist()
    documents, start = [], 0
    for position, token in enumerate(tokens):
        if token == with_ends.eos_id:
            documents.append(bytes(tokens[start:position]).decode())
            start = position + 1
    return sorted(documents)


@pytest.mark.parametrize("name", ["e.jsonl", "e.json", "e.txt", "e.jsonl.gz", "e.arrow"])
def test_an_empty_file_has_no_records(tmp_path: Path, build_set: Build, name: str) -> None:
    """A file of no bytes is listed with nothing in it (one empty document if it is text)."""
    (tmp_path / name).write_bytes(b"")
    good = tmp_path / "good.jsonl"
    good.write_bytes(b"\n".join(LINES))
    manifest = build_set(tmp_path / name, good, validation_fraction=0)
    empty, full = manifest.inputs
    assert empty.ledger.records == empty.ledger.empty == (1 if name == "e.txt" else 0)
    assert full.ledger.documents == len(DOCUMENTS)


@pytest.mark.parametrize("name", ["b.jsonl.gz", "b.json", "b.parquet"])
def test_records_that_cannot_be_read_end_the_job(
    tmp_path: Path, build_set: Build, name: str
) -> None:
    """What the system cannot read has an unknown number of records, so it is an error, not one."""
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(LINES))
    (tmp_path / name).symlink_to("/proc/self/mem")
    with pytest.raises(DataError, match=rf"cannot read .*{name}: .*--exclude it"):
        build_set(tmp_path / "a.jsonl", tmp_path / name)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_bad_records_end_the_job_when_asked(tmp_path: Path, build_set: Build) -> None:
    """With --on-bad fail the first one is named by its position: a byte, or a row."""
    path = tmp_path / "a.jsonl.xz"
    path.write_bytes(lzma.compress(with_line(b"{}")))
    offset = sum(len(line) + 1 for line in LINES[:10])
    with pytest.raises(DataError, match=f"record at byte {offset} is bad: no 'text'"):
        build_set(path, on_bad="fail")
    rows = tmp_path / "b.parquet"
    pq.write_table(pa.table({"text": ["a", None]}), rows)
    with pytest.raises(DataError, match="record at row 1 is bad: 'text' is not a string"):
        build_set(rows, on_bad="fail", output="rows")
