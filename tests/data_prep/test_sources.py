"""Inputs to units to records."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.errors import DataError
from data_prep.sources import (
    InputFile,
    Reading,
    choose_unit_bytes,
    find_inputs,
    plan_units,
    read_unit,
)

BAD_LINES = {
    b'{"text": "cut off': "malformed JSON",
    b'{"text": "\xff\xfe"}': "not UTF-8",
    b'{"text": "\\ud800"}': "lone surrogate",
    b'{"txt": "x"}': "no 'text'",
    b'{"text": null}': "'text' is not a string",
    b'{"text": 42}': "'text' is not a string",
    b'["text"]': "not a JSON object",
    b"[" * 100_000: "malformed JSON",
}


READING = Reading("text")


def read_all(path: Path, unit_bytes: int) -> list[tuple[int, str | None, str]]:
    """Every record of one file: offset, text, reason."""
    units = plan_units(find_inputs([path]), unit_bytes)
    return [
        (record.offset, record.text, record.reason)
        for unit in units
        for record in read_unit(unit, READING)
    ]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=40), max_size=12),
    ending=st.sampled_from(["\n", "\r\n"]),
    unit_bytes=st.integers(1, 64),
    last_newline=st.booleans(),
)
def test_every_cut_gives_every_line_once(
    tmp_path: Path, texts: list[str], ending: str, unit_bytes: int, last_newline: bool
) -> None:
    """However a .jsonl file is cut into units, each line is read once, in order, at its offset."""
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts]
    content = ending.encode().join(lines) + (ending.encode() if last_newline and lines else b"")
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    records = read_all(path, unit_bytes)
    assert [text for _, text, _ in records] == texts
    for (offset, _, _), line in zip(records, lines, strict=True):
        assert content[offset : offset + len(line)] == line


@pytest.mark.parametrize("unit_bytes", [7, 1 << 20])
def test_a_bad_record_costs_no_neighbour(tmp_path: Path, unit_bytes: int) -> None:
    """Between any bad lines all good ones survive, and each bad one has its reason and offset."""
    path = tmp_path / "a.jsonl"
    good = [f"document {number}" for number in range(len(BAD_LINES) + 1)]
    lines: list[bytes] = []
    for text, bad in zip(good, [*BAD_LINES, b"  "], strict=True):
        lines += [json.dumps({"text": text}).encode(), bad]
    path.write_bytes(b"\n".join(lines))
    records = read_all(path, unit_bytes)
    assert [text for _, text, _ in records if text] == good
    assert [text for _, text, _ in records].count("") == 1
    assert [reason for _, _, reason in records if reason] == list(BAD_LINES.values())
    content = path.read_bytes()
    for offset, _, reason in records:
        if reason:
            assert BAD_LINES[content[offset:].split(b"\n")[0]] == reason


def test_odd_but_good_records_are_kept(tmp_path: Path) -> None:
    """A byte order mark, NaN and a surrogate in another field do not cost the text."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "a"}\r\n{"x": NaN, "text": "b"}\r\n'
        b'{"x": "\\ud800", "text": "c\\u0000"}'
    )
    assert [text for _, text, _ in read_all(path, 1 << 20)] == ["a", "b", "c\0"]


def test_directory_is_walked_sorted_without_caches(tmp_path: Path) -> None:
    """A directory gives its text files by sorted path; caches, packages and binaries stay out."""
    for name in (
        "b.py", "a.txt", "sub/c.rs", "sub/__pycache__/x.py", ".git/y.py", "z.so", "Makefile",
        "lib/site-packages/p.py", "data.jsonl", "notes.json",
    ):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (tmp_path / "dangling.py").symlink_to("nowhere")

    def names(*globs: str, exclude: tuple[str, ...] = ()) -> list[str]:
        files = find_inputs([tmp_path], globs, exclude)
        return [Path(file.path).relative_to(tmp_path).as_posix() for file in files]

    assert names() == ["Makefile", "a.txt", "b.py", "data.jsonl", "sub/c.rs"]
    assert names("*.py") == ["b.py"]
    assert names("**/*.rs", "*.so") == ["z.so", "sub/c.rs"]
    assert names(exclude=("sub", "*.jsonl")) == ["Makefile", "a.txt", "b.py"]


def test_files_of_a_directory_are_one_document_each(tmp_path: Path) -> None:
    """A source file is one document byte for byte; binary and non-UTF-8 ones are rejected."""
    contents = {"a.py": b"x = 1\r\n", "b.py": b"\xff\xfe", "c.py": b"a\0b", "d.py": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (unit,) = plan_units(find_inputs([tmp_path]), 1 << 20)
    records = list(read_unit(unit, READING))
    assert [record.text for record in records] == ["x = 1\r\n", None, None, ""]
    assert [record.reason for record in records] == ["", "not UTF-8", "binary", ""]


def test_units_depend_on_sizes_alone() -> None:
    """Small files are grouped, large .jsonl files cut, large text files left whole."""
    files = [
        InputFile("/a.jsonl", "jsonl", 3, 0),
        InputFile("/b.txt", "text", 3, 0),
        InputFile("/c.jsonl", "jsonl", 10, 0),
        InputFile("/d.txt", "text", 10, 0),
        InputFile("/e.txt", "text", 0, 0),
    ]
    units = plan_units(files, 4)
    assert [[(s.file, s.start, s.end) for s in unit.segments] for unit in units] == [
        [(0, 0, 3), (1, 0, 3)],
        [(2, 0, 4)],
        [(2, 4, 8)],
        [(2, 8, 10)],
        [(3, 0, 10)],
        [(4, 0, 0)],
    ]
    assert [unit.number for unit in units] == list(range(6))
    assert choose_unit_bytes(0) == 1 << 20
    assert choose_unit_bytes(1 << 32) == 1 << 25
    assert choose_unit_bytes(1 << 50) == 1 << 26


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.jsonl", "does not exist"),
        ("a.parquet", "convert it to .jsonl"),
        ("empty", "--glob"),
    ],
)
def test_unusable_inputs_are_refused(tmp_path: Path, name: str, message: str) -> None:
    """A missing path, an unread format and a directory without text each say what to do."""
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        find_inputs([tmp_path / name])


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    """A file whose name cannot be recorded is named in bytes; --exclude leaves it out."""
    for name in (b"a.py", b"caf\xe9.py", "b\xa0ü.py".encode()):
        (tmp_path / os.fsdecode(name)).write_bytes(b"pass")
    with pytest.raises(DataError, match=r"caf\\xe9\.py.*is not UTF-8"):
        find_inputs([tmp_path])
    assert len(find_inputs([tmp_path], exclude=["caf*"])) == 2


def test_a_file_given_twice_is_refused(write_jsonl: Callable[..., Path]) -> None:
    """The same file by name and through its directory would be counted twice."""
    path = write_jsonl(["a"])
    with pytest.raises(DataError, match="twice"):
        find_inputs([path.parent, path])


def test_an_input_that_changes_during_the_job_is_refused(write_jsonl: Callable[..., Path]) -> None:
    """A file that is no longer the planned one ends the job instead of mixing two versions."""
    path = write_jsonl(["a", "b"])
    (unit,) = plan_units(find_inputs([path]), 1 << 20)
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(DataError, match="changed while"):
        list(read_unit(unit, READING))


@pytest.mark.parametrize("unit_bytes", [16, 1 << 20])
def test_giant_records_are_rejected_and_cost_no_neighbour(tmp_path: Path, unit_bytes: int) -> None:
    """A line or file above the limit is one reject with that reason; it is never held whole."""
    reading = Reading("text", max_document_bytes=60)
    lengths = (5, 48, 49, 2000, 6)  # with a frame of 11 bytes and the line end
    lines = [b'{"text":"%s"}\n' % (b"x" * length) for length in lengths]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    (tmp_path / "b.txt").write_bytes(b"x" * 61)
    (tmp_path / "c.txt").write_bytes(b"x" * 60)
    records = [
        record
        for unit in plan_units(find_inputs([tmp_path]), unit_bytes)
        for record in read_unit(unit, reading)
    ]
    assert [len(record.text or "") for record in records] == [5, 48, 0, 0, 6, 0, 60]
    assert {record.reason for record in records} == {"", reading.too_long}
