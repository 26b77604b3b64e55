"""Lines to records: every line once, whatever the cut, and bad ones alone."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.inputs import jsonl_inputs
from data_prep.inputs.records import Reading

Read = Callable[..., list[tuple[int, str | None, str]]]

BAD_LINES = {
    b'{"text": "cut off': "malformed JSON",
    b'{"text": "\xff\xfe"}': "not UTF-8",
    b'{"text": "\\ud800"}': "lone surrogate",
    b'{"txt": "x"}': "no 'text'",
    b'{"text": null}': "'text' is not a string",
    b'{"text": 42}': "'text' is not a string",
    b'["text"]': "not a JSON object",
    b"[" * 100_000: "JSON that is nested too deep",
    b'{"text": "x", "deep": ' + b"[" * 9999 + b"]" * 9999 + b"}": "JSON that is nested too deep",
}


@settings(
    deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=40), max_size=12),
    ending=st.sampled_from(["\n", "\r\n"]),
    unit_bytes=st.integers(1, 64),
    last_newline=st.booleans(),
    block_bytes=st.sampled_from([1, 5, 1 << 20]),
)
def test_every_cut_gives_every_line_once(
    tmp_path: Path,
    read_records: Read,
    texts: list[str],
    ending: str,
    unit_bytes: int,
    last_newline: bool,
    block_bytes: int,
) -> None:
    """However a .jsonl file is cut into units and read, each line comes once, at its offset."""
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts]
    content = ending.encode().join(lines) + (ending.encode() if last_newline and lines else b"")
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl_inputs, "BLOCK_BYTES", block_bytes)
        records = read_records(path, unit_bytes=unit_bytes)
    assert [text for _, text, _ in records] == texts
    for (offset, _, _), line in zip(records, lines, strict=True):
        assert content[offset : offset + len(line)] == line


@pytest.mark.parametrize("unit_bytes", [7, 1 << 20])
def test_a_bad_record_costs_no_neighbor(
    tmp_path: Path, read_records: Read, unit_bytes: int
) -> None:
    """Between any bad lines all good ones survive, and each bad one has its reason and offset."""
    path = tmp_path / "a.jsonl"
    good = [f"document {number}" for number in range(len(BAD_LINES) + 1)]
    lines: list[bytes] = []
    for text, bad in zip(good, [*BAD_LINES, b"  "], strict=True):
        lines += [json.dumps({"text": text}).encode(), bad]
    path.write_bytes(b"\n".join(lines))
    records = read_records(path, unit_bytes=unit_bytes)
    assert [text for _, text, _ in records if text] == good
    assert [text for _, text, _ in records].count("") == 1
    assert [reason for _, _, reason in records if reason] == list(BAD_LINES.values())
    content = path.read_bytes()
    for offset, _, reason in records:
        if reason:
            assert BAD_LINES[content[offset:].split(b"\n")[0]] == reason


def test_odd_but_good_records_are_kept(tmp_path: Path, read_records: Read) -> None:
    """A byte order mark, NaN and a surrogate in another field do not cost the text."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "a"}\r\n{"x": NaN, "text": "b"}\r\n'
        b'{"x": "\\ud800", "text": "c\\u0000"}'
    )
    assert [text for _, text, _ in read_records(path)] == ["a", "b", "c\0"]


@pytest.mark.parametrize("unit_bytes", [16, 1 << 20])
def test_giant_lines_are_rejected_and_cost_no_neighbor(
    tmp_path: Path, read_records: Read, unit_bytes: int
) -> None:
    """A line above the limit is one reject with that reason and offset, however long it is."""
    reading = Reading("text", max_document_bytes=60)
    lengths = (5, 49, 50, 3 << 20, 6)  # with a frame of 11 bytes; the fourth spans blocks
    lines = [b'{"text":"%s"}\n' % (b"x" * length) for length in lengths]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(lines))
    records = read_records(path, unit_bytes=unit_bytes * 1000, reading=reading)
    assert [len(text or "") for _, text, _ in records] == [5, 49, 0, 0, 6]
    assert [reason for _, _, reason in records] == ["", "", *[reading.too_long] * 2, ""]
    starts = [sum(map(len, lines[:number])) for number in range(len(lines))]
    assert [offset for offset, _, _ in records] == starts


def test_old_line_ends_are_understood(tmp_path: Path, read_records: Read) -> None:
    """Lines that end in a carriage return alone are records too, with their offsets."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\r{"text": 1}\r{"text": "b"}\r\n{"text": "x\ry"}\n')
    assert read_records(path) == [
        (0, "a", ""),
        (14, None, "'text' is not a string"),
        (26, "b", ""),
        (41, None, "malformed JSON"),
    ]


def test_nested_keys(tmp_path: Path, read_records: Read) -> None:
    """A key with dots names a nested text; a record that has that very key gives it instead."""
    path = tmp_path / "a.jsonl"
    records = [
        {"meta": {"text": "nested"}},
        {"meta.text": "literal", "meta": {"text": "nested"}},
        {"meta": "flat"},
        {"meta": {"text": ["no"]}},
        {"meta": {"text": ""}},
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    found = read_records(path, reading=Reading("meta.text"))
    assert [text for _, text, _ in found] == ["nested", "literal", None, None, ""]
    assert [reason for _, _, reason in found if reason] == [
        "no 'meta.text'",
        "'meta.text' is not a string",
    ]


@pytest.mark.parametrize("number", ["9" * 6000, "-" + "9" * 6000, "1e999", "NaN", "-Infinity"])
def test_numbers_of_any_size_cost_no_text(tmp_path: Path, read_records: Read, number: str) -> None:
    """Other fields of a record are not looked at, also where no number can be made of them."""
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"id": {number}, "text": "kept"}}\n{{"text": {number}}}\n')
    assert [text for _, text, _ in read_records(path)] == ["kept", None]
