"""JSON of any origin: a plain value, or one line that says why not."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundation.json_text import MAX_DEPTH, parse_json, read_json
from tests.support.hostile import check_message

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(VALUES, st.booleans())
def test_what_was_written_is_read(value: Any, ascii_only: bool) -> None:
    """Every plain value comes back, written in ASCII or in UTF-8."""
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert parse_json(text.encode()) == value


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1),
        '{"a":' * 900 + "1" + "}" * 900,
        "9" * 400,
        "9" * 5000,
        str(1 << 63),
        "1e999",
        "NaN",
        "-Infinity",
        '"\\ud800"',
        '{"\\udfff": 1}',
        "",
        "{",
    ],
)
def test_hostile_texts_are_refused(text: str) -> None:
    """Deep nesting, numbers past 64 bits or infinite, and half characters give one line."""
    with pytest.raises(ValueError, match=r".") as caught:
        parse_json(text.encode())
    check_message(str(caught.value))


def test_depth_is_counted_in_levels() -> None:
    """Exactly the bound is read; a pair of escapes is one character."""
    assert parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    assert parse_json(b'"\\ud83d\\ude00"') == "\N{GRINNING FACE}"


def test_files_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    """As a ValueError, like all that is not JSON."""
    (tmp_path / "x.json").write_bytes(b'"\xff"')
    with pytest.raises(ValueError, match="utf-8"):
        read_json(tmp_path / "x.json")
