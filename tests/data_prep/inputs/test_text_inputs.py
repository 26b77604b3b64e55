"""Whole files to records."""

import gzip
from collections.abc import Callable
from pathlib import Path

from data_prep.inputs.records import Reading

Read = Callable[..., list[tuple[int, str | None, str]]]


def test_files_of_a_directory_are_one_document_each(tmp_path: Path, read_records: Read) -> None:
    """A source code file is one document byte for byte; binary and non-UTF-8 ones are rejected."""
    contents = {"a.py": b"x = 1\r\n", "b.py": b"\xff\xfe", "c.py": b"a\0b", "d.py": b""}
    contents["e.txt"] = b"\xef\xbb\xbfmarked\ronce"
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "f.txt.gz").write_bytes(gzip.compress("é".encode()))
    records = read_records(tmp_path)
    assert [text for _, text, _ in records] == ["x = 1\r\n", None, None, "", "marked\ronce", "é"]
    assert [reason for _, _, reason in records] == ["", "not UTF-8", "binary", "", "", ""]


def test_giant_files_are_rejected(tmp_path: Path, read_records: Read) -> None:
    """A file above the limit is one reject, also when only its content is that large."""
    (tmp_path / "a.txt").write_bytes(b"x" * 61)
    (tmp_path / "b.txt").write_bytes(b"x" * 60)
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"x" * 10_000_000))
    reading = Reading("text", max_document_bytes=60)
    records = read_records(tmp_path, reading=reading)
    assert [reason for _, _, reason in records] == [reading.too_long, "", reading.too_long]


def test_an_unreadable_text_file_is_one_reject(tmp_path: Path, read_records: Read) -> None:
    """A file that the system cannot read costs no other, and its reason is the system's."""
    (tmp_path / "a.py").write_text("a")
    (tmp_path / "b.py").symlink_to("/proc/self/mem")
    (tmp_path / "c.py").write_text("c")
    records = read_records(tmp_path)
    assert [text for _, text, _ in records] == ["a", None, "c"]
    assert records[1][2].startswith("unreadable: ")
