"""JSON lines, compressed or not; faults are named by their line."""

import gzip
from pathlib import Path

import pytest

from foundation import json_lines
from foundation.json_lines import read_json_lines, read_plain


def test_lines_keep_their_numbers(tmp_path: Path) -> None:
    """Empty ones are left out, a byte order mark and Windows line ends are no part of them."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n \n{"b": "\xc3\xa9"}')
    assert [(line.number, line.value) for line in read_json_lines(path)] == [
        (1, {"a": 1}),
        (4, {"b": "é"}),
    ]


def test_all_members_of_a_compressed_file_are_read(tmp_path: Path) -> None:
    """As `cat a.gz b.gz` makes them, and with zeros behind them."""
    path = tmp_path / "a.jsonl.GZ"
    path.write_bytes(
        gzip.compress(b'{"a": 1}\n', mtime=0) + gzip.compress(b'{"a": 2}\n') + bytes(512)
    )
    assert [line.value["a"] for line in read_json_lines(path)] == [1, 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": NaN}\n', "line 2 is not JSON"),
        ("a.jsonl", b'{"a": 1}\n3\n', "line 2 is not a JSON object"),
        ("a.jsonl", b'{"a": "\xff"}\n', "line 1 is not JSON"),
        ("a.gz", gzip.compress(b"x" * 99, mtime=0)[:-4], "cut short"),
        ("a.gz", b"plain text", "damaged"),
    ],
)
def test_faults_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    """In one line."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_json_lines(path))


def test_what_decompresses_to_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without making room for it."""
    monkeypatch.setattr(json_lines, "MAX_FILE_BYTES", 1000)
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(bytes(1000)))
    assert len(read_plain(path)) == 1000
    path.write_bytes(gzip.compress(bytes(1001)))
    with pytest.raises(ValueError, match="more than 1,000 bytes"):
        read_plain(path)
