"""Code blocks of the pages, with their markers; docs/README.md is the convention."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
LANGUAGES = ("bash", "python", "yaml", "json", "text")
NEEDS = ("cluster", "gpus", "network", "minutes")
UNMARKED = ("json", "text")

Kind = Literal["run", "file", "part of", "run by", "needs", ""]

_FENCE = re.compile(r"^(`{3,}|~{3,})(.*)$")
_MARKER = re.compile(r"^<!-- (run by|run|file|part of|needs)(?:: (.+?))? -->$")


class Block(NamedTuple):
    """One fenced block.

    Attributes:
        page: relative to the root.
        line: of its fence, from 1.
        language: what the fence says.
        kind: of its marker; empty without one.
        value: what the marker says after the colon.
        text: the lines between the fences.
    """

    page: str
    line: int
    language: str
    kind: Kind
    value: str
    text: str

    @property
    def where(self) -> str:
        """The block's position, as an editor takes it."""
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """Every page whose blocks are held to the convention."""
    found = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")]
    found += sorted((ROOT / "docs").rglob("*.md"))
    skipped = ROOT / "docs" / "_build"
    return [
        path
        for path in found
        if path.is_file() and skipped not in path.parents and path != ROOT / "docs" / "README.md"
    ]


def blocks_of(path: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order; directives of Sphinx, `{name}`, are none."""
    page = str(path.relative_to(ROOT))
    lines = path.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        if not fence:
            number += 1
            continue
        close = next(
            (at for at in range(number + 1, len(lines)) if lines[at].strip() == fence[1]), None
        )
        assert close is not None, f"{page}:{number + 1}: this block is never closed"
        if not fence[2].startswith("{"):
            kind, value = _marker(lines[number - 1] if number else "")
            text = "\n".join(lines[number + 1 : close]) + "\n"
            yield Block(page, number + 1, fence[2].strip(), kind, value, text)
        number = close + 1


def all_blocks() -> list[Block]:
    """The blocks of all pages."""
    return [block for path in pages() for block in blocks_of(path)]


def prose(path: Path) -> str:
    """A page without its fenced blocks."""
    text = path.read_text(encoding="utf-8")
    return re.sub(r"^(`{3,}).*?^\1\n", "", text, flags=re.MULTILINE | re.DOTALL)


def _marker(line: str) -> tuple[Kind, str]:
    found = _MARKER.match(line.strip())
    return (found[1], found[2] or "") if found else ("", "")  # type: ignore[return-value]
