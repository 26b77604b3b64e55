"""Rooms and the imports between them, read from the source files."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("foundation", "data_prep", "model", "pipeline")
# Exceptions are words that everybody may use; as arrows they would say nothing.
_WITHOUT = ("errors", "__init__")


class Arrow(NamedTuple):
    """One room imports another."""

    importer: str
    imported: str


def module_files() -> dict[str, Path]:
    """Every module of the packages by its dotted name."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.stem not in _WITHOUT
    }


def room_of(module: str) -> str:
    """The folder that a module lies in; modules on top of a package are a room of their own.

    `model/generate.py` and `model/serve.py` are commands on top of a package whose other files are
    its bottom, so each is a room alone.
    """
    package, *below = module.split(".")
    if module in ("model.generate", "model.serve"):
        return module
    return f"{package}.{below[0]}" if len(below) > 1 else package


def imported_modules(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of `known` that a file imports, also within functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
            yield from sorted(names & known.keys())


def room_arrows() -> dict[Arrow, int]:
    """How many imports there are from one room to another."""
    files = module_files()
    arrows: dict[Arrow, int] = {}
    for module, path in files.items():
        for imported in imported_modules(path, files):
            arrow = Arrow(room_of(module), room_of(imported))
            if arrow.importer != arrow.imported:
                arrows[arrow] = arrows.get(arrow, 0) + 1
    return dict(sorted(arrows.items()))


def needed_arrows(arrows: dict[Arrow, int]) -> list[Arrow]:
    """The arrows that no chain of others implies, of a graph without cycles."""
    below: dict[str, set[str]] = {}
    for importer, imported in arrows:
        below.setdefault(importer, set()).add(imported)

    def reach(room: str, seen: set[str]) -> set[str]:
        for other in below.get(room, ()):
            if other not in seen:
                seen.add(other)
                reach(other, seen)
        return seen

    return [
        arrow
        for arrow in arrows
        if not any(
            arrow.imported in reach(middle, set())
            for middle in below[arrow.importer] - {arrow.imported}
        )
    ]
