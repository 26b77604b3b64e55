"""Damage to the files of a folder: bytes, values within JSON, and things that are no files."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st

_CONTENTS = (
    *(b"", b"\x00" * 100, b"{}", b"[]", b"null", b"NaN", b'"\\ud800"', b"[" * 100_000, b"\xff\xfe"),
    *(b'{"a":' * 2000 + b"1" + b"}" * 2000, b"9" * 5000, b"\xff" * 7 + b"\x7f" + b"{}", b"step: x"),
    (1 << 62).to_bytes(8, "little") + b"{}",
    (2).to_bytes(8, "little") + b"{}",
)
_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        7,
        64,
        1 << 31,
        1 << 40,
        1 << 62,
        1 << 63,
        10**400,
        0.5,
        1e308,
    ),
    *(
        float("nan"),
        float("inf"),
        "",
        "x",
        "a\x00b",
        "\x1b[2J",
        "\ud800",
        "x" * 5000,
        "../..",
        "/etc",
    ),
    *("/dev/zero", "9" * 5000, [], {}, [[]], {"x": 1}, [0] * 3000, "cpu", "F64", "U8", "llama3"),
)


class Damage(NamedTuple):
    """What becomes of one file.

    Attributes:
        file: its number among the folder's files.
        how: the kind of damage.
        place: where in it, as a share of its length or of its values.
        choice: which content or value.
    """

    file: int
    how: str
    place: float
    choice: int


_KINDS = ("flip", "cut", "extend", "replace", "gone", "folder", "pipe", "device", "linked", "value")
DAMAGES = st.builds(
    Damage,
    st.integers(0, 1000),
    st.sampled_from((*_KINDS, "value", "value", "value")),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 1000),
)


@contextmanager
def damaged_copy(folder: Path, *damages: Damage) -> Iterator[Path]:
    """A copy of a folder beside it, with some of its files damaged; gone at the end."""
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    try:
        for damage in damages:
            files = sorted(path for path in copy.rglob("*") if not path.is_dir())
            if files:
                apply(damage, files[damage.file % len(files)], outside=folder.with_name("outside"))
        yield copy
    finally:
        shutil.rmtree(copy)


def apply(damage: Damage, path: Path, outside: Path) -> None:
    """Damage a file; `outside` is where links lead to."""
    content = bytearray(path.read_bytes()) if path.is_file() and not path.is_symlink() else None
    if content is None:
        return
    place = int(damage.place * len(content))
    path.unlink()
    if damage.how == "flip" and content:
        content[place] ^= 1 << damage.choice % 8
    elif damage.how == "cut":
        del content[place:]
    elif damage.how == "extend":
        content += _CONTENTS[damage.choice % len(_CONTENTS)]
    elif damage.how == "replace":
        content = bytearray(_CONTENTS[damage.choice % len(_CONTENTS)])
    elif damage.how == "value":
        content = bytearray(_with_other_value(bytes(content), path.suffix, damage))
    elif damage.how == "folder":
        path.mkdir()
    elif damage.how == "pipe":
        os.mkfifo(path)
    elif damage.how == "device":
        path.symlink_to("/dev/zero")
    elif damage.how == "linked":
        outside.write_bytes(content)
        path.symlink_to(outside)
    if damage.how in ("flip", "cut", "extend", "replace", "value"):
        path.write_bytes(content)


def _with_other_value(content: bytes, suffix: str, damage: Damage) -> bytes:
    """JSON, the header of safetensors or lines of JSON with one value, or one key, replaced."""
    if suffix == ".safetensors":
        length = int.from_bytes(content[:8], "little")
        header = _with_other_value(content[8 : 8 + length], ".json", damage)
        return len(header).to_bytes(8, "little") + header + content[8 + length :]
    if suffix == ".jsonl":
        lines = content.split(b"\n")
        number = damage.file * 31 % max(len(lines) - 1, 1)
        lines[number] = _with_other_value(lines[number], ".json", damage)
        return b"\n".join(lines)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return content
    places = list(_places(value))
    if places:
        holder, key = places[int(damage.place * len(places))]
        new = _VALUES[damage.choice % len(_VALUES)]
        if isinstance(holder, dict) and isinstance(new, str) and damage.file % 2:
            holder[new] = holder.pop(key)
        else:
            holder[key] = new
    return json.dumps(value).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every list or mapping within a value, with each of its positions."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])
