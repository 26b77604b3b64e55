"""The page on architecture: its picture is that of the imports, its walks go where they say."""

import ast
import html
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from docs.pictures.architecture import ROOMS, description
from docs.pictures.import_graph import (
    Arrow,
    imported_modules,
    module_files,
    needed_arrows,
    room_arrows,
)
from tests.support.page_blocks import ROOT

PAGE = ROOT / "docs" / "explanation" / "architecture.md"
PICTURE = ROOT / "docs" / "pictures" / "architecture.svg"
WALKS = {
    "A document to a shard",
    "A token to a gradient",
    "A gradient to a weight",
    "A weight to a file and back",
    "A prompt to text",
}
_STEP = re.compile(r"^(\d+)\. (.*(?:\n   .*)*)", re.MULTILINE)
_NAME = re.compile(r"`([A-Za-z_][\w.]*)`")


class Step(NamedTuple):
    """One step of a walk: files in the order in which they are named, and the names of each."""

    text: str
    files: list[str]
    names: list[tuple[str, str]]


def _walks() -> dict[str, list[Step]]:
    parts = PAGE.read_text(encoding="utf-8").split("\n### ")[1:]
    return {
        part.split("\n", 1)[0]: [_step(found[2]) for found in _STEP.finditer(part)]
        for part in parts
    }


def _step(text: str) -> Step:
    """A name belongs to the file that was named last before it."""
    files: list[str] = []
    names: list[tuple[str, str]] = []
    for word in re.findall(r"`([^`]+)`", text):
        if word.endswith(".py"):
            files.append(word)
        elif files and _NAME.fullmatch(f"`{word}`"):
            names.append((files[-1], word))
    return Step(text, files, names)


@cache
def _defined(path: str) -> frozenset[str]:
    """Functions, classes and methods (as `Class.method`) of a file, with those it inherits."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return frozenset(_definitions(tree.body, ""))


def _definitions(body: list[ast.stmt], prefix: str) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from _definitions(node.body, f"{node.name}.")


WALKED = _walks()
STEPS = [(title, number) for title, steps in WALKED.items() for number in range(len(steps))]


def test_all_five_walks_are_there() -> None:
    """None was lost, and none is a stub."""
    assert set(WALKED) == WALKS
    assert all(len(steps) >= 7 for steps in WALKED.values())


@pytest.mark.parametrize(("title", "number"), STEPS)
def test_step_names_what_exists(title: str, number: int) -> None:
    """Its file is there, and defines each function or class that the step names."""
    step = WALKED[title][number]
    assert step.files, step.text
    assert [file for file in step.files if not (ROOT / file).is_file()] == []
    assert [(file, name) for file, name in step.names if name not in _defined(file)] == []


@pytest.mark.parametrize("title", sorted(WALKS))
def test_steps_hang_together(title: str) -> None:
    """Each step's files import, or are imported by, one of an earlier step: it can be followed."""
    modules = module_files()
    names = {str(path.relative_to(ROOT)): name for name, path in modules.items()}
    seen: set[str] = set()
    loose = []
    for step in WALKED[title]:
        here = {names[file] for file in step.files}
        if seen and not here & seen and not _connected(here, seen, modules):
            loose.append(step.text)
        seen |= here
    assert loose == []


def _connected(here: set[str], before: set[str], modules: dict[str, Path]) -> bool:
    imports = {name: set(imported_modules(modules[name], modules)) for name in here | before}
    return any(imports[a] & before for a in here) or any(imports[b] & here for b in before)


def test_picture_is_that_of_the_imports() -> None:
    """The committed picture carries the arrows it was drawn from; they are today's."""
    svg = PICTURE.read_text(encoding="utf-8")
    found = re.search(r"<dc:description>(.*?)</dc:description>", svg, re.DOTALL)
    assert found is not None, "the picture carries no arrows"
    again = "draw it again: python -m docs.pictures.architecture"
    assert html.unescape(found[1]) == description(room_arrows()), again


def test_every_room_is_drawn_and_described() -> None:
    """A new room gets a place in the picture before it can be committed."""
    rooms = {room for arrow in room_arrows() for room in arrow}
    assert rooms - ROOMS.keys() == set()


def test_arrows_that_follow_from_others_are_left_out() -> None:
    """A -> c is left out beside a -> b -> c, and nothing else is."""
    arrows = {Arrow("a", "b"): 1, Arrow("b", "c"): 2, Arrow("a", "c"): 3, Arrow("a", "d"): 1}
    assert needed_arrows(arrows) == [Arrow("a", "b"), Arrow("b", "c"), Arrow("a", "d")]


def test_imports_within_functions_count(tmp_path: Path) -> None:
    """What a file imports late, or as a module of a package, is found too."""
    source = tmp_path / "source.py"
    source.write_text("def f():\n    from model import loss\n    import model.heads\n")
    known = {"model.loss": Path(), "model.heads": Path(), "model.trunk": Path()}
    assert set(imported_modules(source, known)) == {"model.loss", "model.heads"}
