"""Corpora of any content: they become a shard set that verifies, or one clear error."""

import functools
import gzip
import io
import lzma
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd
from hypothesis import strategies as st

from data_prep import shard, verify
from tests.support.hostile import call_command, fuzzed, untouched

RECORDS: list[object] = [
    *({"text": f"record {number} naïve 数据 \u0301 text", "n": number} for number in range(30)),
    *({"text": ""}, {"text": None}, {"text": 7}, {"txt": "x"}, ["text"], "text", {"a": {"b": "c"}}),
    *({"text": "\x00 zero"}, {"text": "<|endoftext|>"}, {"text": "word " * 300}),
]
LINES = b"".join(orjson.dumps(record) + b"\n" for record in RECORDS)
TEXTS = [record["text"] for record in RECORDS[:30] if isinstance(record, dict)]


def _parquet() -> bytes:
    table = pa.table({"id": list(range(30)), "text": TEXTS, "a": [{"b": text} for text in TEXTS]})
    written = io.BytesIO()
    pq.write_table(table, written, row_group_size=8)
    return written.getvalue()


def _arrow(*, is_file: bool) -> bytes:
    table = pa.table({"text": TEXTS, "kind": pa.array(TEXTS[:3] * 10).dictionary_encode()})
    written = pa.BufferOutputStream()
    with (pa.ipc.new_file if is_file else pa.ipc.new_stream)(written, table.schema) as writer:
        writer.write_table(table, max_chunksize=8)
    return bytes(written.getvalue())


CONTENTS: dict[str, Callable[[], bytes]] = {
    ".jsonl": lambda: LINES,
    ".json": lambda: b"[" + LINES.replace(b"\n", b",\n").removesuffix(b",\n") + b"]",
    ".txt": lambda: "\n".join(TEXTS).encode(),
    ".parquet": _parquet,
    ".arrow": functools.partial(_arrow, is_file=True),
    ".stream.arrow": functools.partial(_arrow, is_file=False),
    ".jsonl.gz": lambda: gzip.compress(LINES, mtime=0) * 2,
    ".jsonl.zst": lambda: zstd.compress(LINES) * 2,
    ".jsonl.xz": lambda: lzma.compress(LINES),
    ".json.gz": lambda: gzip.compress(CONTENTS[".json"](), mtime=0),
    ".txt.zst": lambda: zstd.compress(LINES),
}
made = functools.cache(lambda suffix: CONTENTS[suffix]())


class Damage(NamedTuple):
    """What happens to the content of a file: `place` and `share` are parts of its length."""

    how: str
    place: float
    share: float
    content: bytes


PIECES = st.sampled_from(
    [
        *(b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n", b"\r\n", b"{", b"}", b"[", b"]", b'"'),
        *(b"\\ud800", b"[" * 5000, b"9" * 5000, b'{"text": "x"', b"null\n", b"\x1b[2J", b"PAR1"),
        *(b"ARROW1\0\0", b"\xff\xff\xff\xff", b"\xff" * 8, b"\x7f\xff\xff\xff", bytes(64)),
        *(b"\x28\xb5\x2f\xfd\x00\xa8", b"\x1f\x8b\x08\x00", b"\xfd7zXZ\x00"),
    ]
)
DAMAGE = st.builds(
    Damage,
    st.sampled_from(["flip", "cut", "insert", "remove", "replace", "append", "repeat"]),
    st.floats(0, 1),
    st.sampled_from([0.0, 0.001, 0.01, 0.1, 0.5, 1.0]),
    PIECES | st.binary(min_size=1, max_size=12),
)
NAMES = st.sampled_from(
    ["a", "a", "a", "-a", "--output", "a b", "ü数", "a\nb", "a\x1b[2J", "a\udcff", "%s{}", "~", "*"]
)
OPTIONS: list[list[str]] = [
    *([], [], [], ["--dedup"], ["--text-key", "a.b"], ["--text-key", "id"], ["--text-key", "."]),
    *(["--special-tokens", "reject"], ["--special-tokens", "id"], ["--on-bad", "fail"]),
    *(["--shard-tokens", "1"], ["--shard-tokens", "200"], ["--unit-bytes", "300"]),
    *(["--max-document-bytes", "1"], ["--max-document-bytes", "100"], ["--glob", "*"]),
    *(["--max-bad-fraction", "0"], ["--validation-fraction", "0.5"], ["--eos-token", "a"]),
    *(["--tokenizer", "train:300"], ["--tokenizer", "train:257", "--encoder", "tokenizers"]),
]
ANY_OPTIONS = st.lists(st.sampled_from(OPTIONS), max_size=3)


def damaged(content: bytes, damages: Sequence[Damage]) -> bytes:
    """A content after everything that happens to it."""
    for how, place, share, piece in damages:
        first = int(place * len(content))
        last = min(len(content), first + max(1, int(share * len(content))))
        before, part, after = content[:first], content[first:last], content[last:]
        if how == "flip":
            part = bytes(part[:1].translate(bytes(value ^ piece[0] for value in range(256))))
            part += content[first + 1 : last]
        content = {
            "flip": before + part + after,
            "cut": before,
            "insert": before + piece + part + after,
            "remove": before + after,
            "replace": before + piece + after,
            "append": before + part + after + piece,
            "repeat": before + part + part + after,
        }[how]
    return content


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A folder for the corpus, and one in which the output is made."""
    (tmp_path / "in").mkdir()
    (tmp_path / "made").mkdir()
    return tmp_path / "in", tmp_path / "made"


def build(folders: tuple[Path, Path], inputs: Sequence[Path], options: list[list[str]]) -> int:
    """Build twice and verify: only the output is touched, and a set that is made is whole."""
    corpus, made_in = folders
    output = made_in / "out"
    names = [f"./{path}" if str(path).startswith("-") else str(path) for path in inputs]
    arguments = ["--output", str(output), "--tokenizer", "bytes", "--workers", "1"]
    arguments += [
        "--input",
        *names,
        "--max-bad-fraction",
        "1",
        *(o for part in options for o in part),
    ]
    try:
        with untouched(corpus):
            ended = call_command(shard.main, arguments)
            again = call_command(shard.main, arguments)
        assert (again.code == 0) == (ended.code == 0), (ended, again)
        assert [path.name for path in made_in.iterdir()] in ([], ["out"])
        if ended.code == 0:
            checked = call_command(verify.main, [str(output)])
            assert checked.code == 0, checked
        return ended.code
    finally:
        shutil.rmtree(made_in)
        made_in.mkdir()
        for path in inputs:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@fuzzed(
    90,
    suffix=st.sampled_from(sorted(CONTENTS)),
    damages=st.lists(DAMAGE, min_size=1, max_size=3),
    options=ANY_OPTIONS,
)
def test_damaged_files(
    folders: tuple[Path, Path], suffix: str, damages: list[Damage], options: list[list[str]]
) -> None:
    """Cut, flipped, stretched and patched files of every format that is read."""
    path = folders[0] / f"a{suffix}"
    path.write_bytes(damaged(made(suffix), damages))
    build(folders, [path], options)


@fuzzed(
    30,
    names=st.lists(NAMES, min_size=1, max_size=3, unique=True),
    suffixes=st.lists(st.sampled_from([*sorted(CONTENTS), "", ".bin", ".gz"]), min_size=3),
    kinds=st.lists(st.sampled_from([*sorted(CONTENTS), "folder", "link", "pipe"]), min_size=3),
    options=ANY_OPTIONS,
)
def test_odd_folders(
    folders: tuple[Path, Path],
    names: list[str],
    suffixes: list[str],
    kinds: list[str],
    options: list[list[str]],
) -> None:
    """Any names, files under the suffix of another format, folders, dangling links and pipes."""
    corpus = folders[0] / "corpus"
    corpus.mkdir()
    for name, suffix, kind in zip(names, suffixes, kinds, strict=False):
        path = corpus / f"{name}{suffix}"
        if kind == "folder":
            path.mkdir()
        elif kind == "link":
            path.symlink_to("nowhere")
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.write_bytes(made(kind))
    build(folders, [corpus], options)


@fuzzed(
    30,
    lines=st.lists(st.binary(max_size=40) | st.text(max_size=20).map(str.encode), max_size=8),
    suffix=st.sampled_from([".jsonl", ".json", ".txt", ".py"]),
    options=ANY_OPTIONS,
)
def test_any_bytes(
    folders: tuple[Path, Path], lines: list[bytes], suffix: str, options: list[list[str]]
) -> None:
    """Files that are no corpus at all, beside one that is."""
    paths = [folders[0] / f"a{suffix}", folders[0] / "b.jsonl"]
    paths[0].write_bytes(b"\n".join(lines))
    paths[1].write_bytes(LINES)
    build(folders, paths, options)


@pytest.mark.parametrize("suffix", sorted(CONTENTS))
def test_whole_files_are_built(folders: tuple[Path, Path], suffix: str) -> None:
    """What the damage above is done to is read without an error."""
    path = folders[0] / f"a{suffix}"
    path.write_bytes(made(suffix))
    assert build(folders, [path], []) == 0
