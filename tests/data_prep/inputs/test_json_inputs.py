"""JSON values out of a stream: whatever the blocks, layout or fault."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.inputs import json_inputs
from data_prep.inputs.json_inputs import read_json
from data_prep.inputs.records import Reading

Read = Callable[..., list[tuple[int, str | None, str]]]
Found = list[tuple[int, bytes | None]]

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)
OBJECTS = st.builds(
    lambda text, extra: {"x": extra, "text": text, "y": extra}, st.text(max_size=20), VALUES
)


class Dripping(io.BytesIO):
    """A stream that gives a few bytes at a time."""

    def __init__(self, content: bytes, size: int) -> None:
        super().__init__(content)
        self._size = size

    def read(self, size: int | None = -1, /) -> bytes:
        """At most `size` bytes, and few."""
        return super().read(self._size)


def read_all(content: bytes, size: int, limit: int = 1 << 20) -> Found:
    """Offset and text of every record in order; None for rejects."""
    found: Found = []
    for batch in read_json(Dripping(content, size), 0, Reading("text", limit)):
        found += zip(batch.offsets, batch.texts, strict=True)
        found += [(reject.offset, None) for reject in batch.rejects]
    return sorted(found, key=lambda record: record[0])


@settings(deadline=None, max_examples=120)
@given(
    records=st.lists(OBJECTS, max_size=5),
    indent=st.sampled_from([None, 0, 1, 2, "\t"]),
    is_array=st.booleans(),
    is_ascii=st.booleans(),
    size=st.integers(1, 40),
    mark=st.booleans(),
)
def test_every_layout_gives_every_value(
    records: list[dict[str, object]],
    indent: int | str | None,
    is_array: bool,
    is_ascii: bool,
    size: int,
    mark: bool,
) -> None:
    """Arrays and objects in a row, pretty-printed or not, come whole at any size of blocks."""

    def dump(value: object) -> str:
        text = json.dumps(value, indent=indent, ensure_ascii=is_ascii)
        return text.encode("utf-8", "replace").decode()

    content = dump(records) if is_array else "\n".join(map(dump, records))
    start = b"\xef\xbb\xbf" if mark else b""
    expected = [
        str(record["text"]).encode("utf-8", "replace").decode().encode() for record in records
    ]
    found = read_all(start + content.encode(), size)
    assert [text for _, text in found] == expected
    for offset, _ in found:
        assert (start + content.encode())[offset : offset + 1] == b"{"


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'[{"text": "a"}, {"text": }, {"text": "b"}]', [b"a", None, b"b"]),
        (b'[{"text": "a"}, 17, null, ["text"], "b"]', [b"a", None, None, None, b"b"]),
        (b'[{"text": "a", {"text": "b"}, {"text": "c"}]', [None, b"b", b"c"]),
        (b'[\n{"text": "a"},\n{"text": "b\n},\n{"text": "c"}\n]', [b"a", None, b"c"]),
        (b'[\n {"text": "a"},\n {"text": ["b"},\n {"text": "c"}\n]', [b"a", None, b"c"]),
        (b'[{"text": "a"}, {"text": "b\n}, {"text": "c"}]', [b"a", None]),
        (b'[{"text": "a"}, {"text": "b', [b"a", None]),
        (b'[{"text": "a"},', [b"a", None]),
        (b'{"data": [{"text": "a"}]}', [None]),
        (b'{"text": "a\\\\"} {"text": "\\"b"}', [b"a\\", b'"b']),
        (b'["\\ud800", "a\\u0000", "\\q"]', [None, b"a\0", None]),
        (b"}", [None]),
        (b"[]", []),
        (b"", []),
    ],
)
def test_faults_cost_one_value(content: bytes, expected: list[bytes | None], size: int) -> None:
    """A malformed value is one reject; where values can still be told apart, no other is lost."""
    assert [text for _, text in read_all(content, size)] == expected


@pytest.mark.parametrize("size", [3, 1 << 20])
def test_giant_values_are_rejected(size: int) -> None:
    """A value above the limit is one reject, and the next is read."""
    giant = json.dumps({"text": 'x"y\\' * 100})
    content = f'[{{"text": "a"}}, {giant}, {{"text": "b"}}]'.encode()
    assert [text for _, text in read_all(content, size, limit=60)] == [b"a", None, b"b"]


def test_a_line_per_object_is_read_as_lines(tmp_path: Path, read_records: Read) -> None:
    """A .json of lines is cut into units like .jsonl, and a bad line costs no other."""
    path = tmp_path / "a.json"
    lines = [json.dumps({"text": str(number)}) for number in range(50)]
    lines[20] = '{"text": [}'
    path.write_text("\n".join(lines))
    records = read_records(path, unit_bytes=100)
    assert [text for _, text, _ in records] == [
        None if number == 20 else str(number) for number in range(50)
    ]


def test_memory_is_bounded_by_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between blocks the scanner holds the open value alone, however long the array is."""
    held = []
    feed = json_inputs._Scanner.feed

    def watch(self: json_inputs._Scanner, block: bytes, is_last: bool = False) -> object:
        batch = feed(self, block, is_last)
        held.append(sum(map(len, self._pieces)) + len(self._carry) + len(self._behind))
        return batch

    monkeypatch.setattr(json_inputs._Scanner, "feed", watch)
    content = json.dumps([{"text": "word " * 40}] * 500).encode()
    assert len(read_all(content, 1000)) == 500
    assert len(held) > 100
    assert max(held) < 600
