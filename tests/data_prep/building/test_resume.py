"""A resumed build checks what it finds."""

from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.shards.manifest import Manifest

Build = Callable[..., Manifest]
Write = Callable[..., Path]
ReadTree = Callable[[Path], dict[str, bytes]]


def change_digit(path: Path, after: bytes) -> None:
    """Another digit behind the first occurrence of some bytes."""
    content = bytearray(path.read_bytes())
    position = content.index(after) + len(after)
    content[position] = ord("7") if content[position] != ord("7") else ord("5")
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("journal/units.jsonl", b'"jsonl",'),
        ("journal/units.jsonl", b"],0,"),
        ("journal/00001.json", b'"records":'),
        ("journal/00001.json", b'"text_bytes":'),
        ("journal/00001.json", b'"file_xxh3_128":"'),
        ("shards/train/corpus/00001.arrow", b"eos_id"),
        ("shards/train/corpus/00001.arrow", b"one after each"),
    ],
)
def test_what_an_earlier_run_wrote_is_not_believed(
    tmp_path: Path, texts: list[str], write_jsonl: Write, build_set: Build, read_tree: ReadTree,
    name: str, after: bytes,
) -> None:  # fmt: skip
    """One digit of the journal or of a shard changed before the resume: the set is the same."""
    path = write_jsonl(texts)
    build_set(path, unit_bytes=8000)
    expected = read_tree(tmp_path / "out")
    for lost in ("manifest.json", "journal/committed.json", "shards/train/corpus/00002.arrow"):
        (tmp_path / "out" / lost).unlink()
    change_digit(tmp_path / "out" / name, after)
    build_set(path, unit_bytes=8000)
    assert read_tree(tmp_path / "out") == expected
