"""The import graph: who may import whom, in one place each, no cycles, on a bare CPU machine."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("foundation", "data_prep", "model", "pipeline")
# The rooms of each package, lowest first: a room imports from itself and from those before it.
ROOMS = {
    "data_prep": (
        "tokenization",
        "conversations",
        "inputs",
        "shards",
        "workers",
        "building",
        "loading",
    ),
    "model": (
        "operations",
        "memory",
        "structure",
        "hugging_face",
        "inference",
        "decoding",
        "early_exit",
        "beams",
        "joint_decoding",
        "streaming",
        "writing",
        "serving",
    ),
    "pipeline": (
        "distributed",
        "stages",
        "config",
        "checkpoint",
        "data",
        "review",
        "guard",
        "engine",
        "planning",
        "reporting",
        "exporting",
        "sandbox",
        "evaluating",
        "launching",
        "diagnosis",
    ),
}
ABSENT_ON_A_CPU = ("triton", "flash_attn", "transformer_engine", "liger_kernel", "apex", "wandb")


class Import(NamedTuple):
    """One import statement: the module that has it, and the module it names."""

    importer: str
    imported: str
    type_checking: bool


def _module_files() -> dict[str, Path]:
    files = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files | {"headway": ROOT / "headway.py"}


MODULES = _module_files()


def _statements(module: ast.Module) -> Iterator[tuple[ast.AST, bool]]:
    """All statements of a module, each with whether only a type checker executes it."""
    pending: list[tuple[ast.AST, bool]] = [(module, False)]
    while pending:
        node, type_checking = pending.pop()
        yield node, type_checking
        is_block = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        pending += [
            (child, type_checking or is_block)
            for child in ast.iter_child_nodes(node)
            if not isinstance(child, ast.expr)  # nothing is imported in an expression
        ]


def imports_of(name: str, path: Path) -> list[Import]:
    """Every import of a module, also those inside functions."""
    found = []
    for node, type_checking in _statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [Import(name, alias.name, type_checking) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports by a relative path"
            assert node.module is not None
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            names = {full if full in MODULES else node.module for full in below}
            found += [Import(name, imported, type_checking) for imported in sorted(names)]
    return found


IMPORTS = [found for name, path in MODULES.items() for found in imports_of(name, path)]


def _package(module: str) -> str:
    return module.partition(".")[0]


def _room(module: str) -> str | None:
    """The room that a module of ours is in; None at a package's top, or elsewhere."""
    parts = module.split(".")
    return parts[1] if parts[0] in ROOMS and len(parts) > 2 else None


# What runs as `python -m`: every file at the top of data_prep and pipeline, generate and serve.
COMMANDS = {
    name
    for name in MODULES
    if name.count(".") == 1
    and _package(name) in ("data_prep", "pipeline")
    and not name.endswith(".errors")
} | {"model.generate", "model.serve"}


def test_there_are_modules_to_look_at() -> None:
    """The checks below see every package; a wrong path would make them pass on nothing."""
    assert {_package(name) for name in MODULES} == {*PACKAGES, "headway"}
    assert any(found.imported.startswith("data_prep.") for found in IMPORTS)


def test_model_and_data_prep_import_nothing_of_ours_outside_themselves() -> None:
    """They stand on the foundation alone, which stands on nothing; only the pipeline knows both."""
    crossing = [
        found
        for found in IMPORTS
        if _package(found.importer) not in ("pipeline", "headway")
        and _package(found.imported) in (*PACKAGES, "benchmarks")
        and _package(found.imported) not in ("foundation", _package(found.importer))
    ]
    assert crossing == []


def test_only_the_console_script_stands_above_the_pipeline() -> None:
    """`headway` calls the list of commands; nothing calls `headway`."""
    used = {found.imported for found in IMPORTS if found.importer == "headway"}
    assert {name for name in used if _package(name) in PACKAGES} == {"pipeline.commands"}
    assert [found for found in IMPORTS if found.imported == "headway"] == []


def test_nothing_imports_the_tests() -> None:
    """What is installed does not need the tests."""
    assert [found for found in IMPORTS if _package(found.imported) == "tests"] == []


def test_arrows_between_rooms_go_down() -> None:
    """A room imports its own files and those of the rooms before it in the list, never back up.

    Files at a package's top are its commands and hot path, which may use every room.
    """
    wrong = []
    for found in IMPORTS:
        below, above = _room(found.imported), _room(found.importer)
        if None in (below, above) or below == above or found.type_checking:
            continue
        order = ROOMS[_package(found.importer)]
        if _package(found.imported) == _package(found.importer) and order.index(
            str(below)
        ) > order.index(str(above)):
            wrong.append(found)
    assert wrong == []


def test_rooms_do_not_import_commands() -> None:
    """What stands at a package's top uses the rooms; only errors are shared from there."""
    wrong = [
        found
        for found in IMPORTS
        if _room(found.importer) is not None
        and found.imported in MODULES
        and found.imported in COMMANDS
    ]
    assert wrong == []


def test_every_room_is_listed_and_has_at_most_a_dozen_files() -> None:
    """A new folder gets its place in the order; a room that grows past a dozen is divided."""
    for package, order in ROOMS.items():
        folders = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
        assert folders == set(order)
        for room in order:
            files = [path.name for path in (ROOT / package / room).glob("*.py")]
            assert len(files) - 1 <= 12, (package, room, files)


def test_deepspeed_is_imported_in_one_room() -> None:
    """Another engine would have to be written in one room."""
    importers = {found.importer for found in IMPORTS if _package(found.imported) == "deepspeed"}
    assert importers == {
        "pipeline.engine.build",
        "pipeline.engine.deepspeed_internals",
        "pipeline.engine.pipeline_stage",
    }


def _private_names() -> set[str]:
    """Every private attribute that the fence names: what it gives to `_private`, and `_TO_COME`."""
    names = set()
    path = MODULES["pipeline.engine.deepspeed_internals"]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "_private":
            _, name = node.args
            if isinstance(name, ast.Constant):  # else a loop over names that are given elsewhere
                names.add(str(name.value))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_TO_COME":
            names.add(ast.literal_eval(node.value))
    return names - {"optimizer", "partition", "all_gather"}  # too common to be told by name


def test_private_parts_of_deepspeed_are_read_in_one_file() -> None:
    """By the attribute's name, however the object came there; and none beside the known ones."""
    names = _private_names()
    assert {"_hp_mapping", "ds_tensor", "averaged_gradients", "ds_grads_remaining"} <= names
    found = []
    for module, path in MODULES.items():
        if module == "pipeline.engine.deepspeed_internals":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = None
            if isinstance(node, ast.Attribute):
                name = node.attr
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                name = node.value
            if name is not None and (name in names or name.startswith(("ds_", "_z3"))):
                found.append(f"{path}:{getattr(node, 'lineno', 0)} {name}")
    assert found == []


def test_pyarrow_has_two_importers_in_data_prep() -> None:
    """The file format of shards is the business of one file, Arrow as an input of another."""
    assert {found.importer for found in IMPORTS if _package(found.imported) == "pyarrow"} == {
        "data_prep.shards.arrow_file",
        "data_prep.inputs.arrow_inputs",
    }


def test_no_import_cycles() -> None:
    """Every module can be read, and imported, before those that use it."""
    graph: dict[str, set[str]] = {name: set() for name in MODULES}
    for found in IMPORTS:
        if found.imported in MODULES and not found.type_checking:
            graph[found.importer].add(found.imported)
    # Take away, again and again, what needs nothing that is left; a cycle is what stays.
    while free := {name for name, needed in graph.items() if not needed & graph.keys()}:
        graph = {name: needed for name, needed in graph.items() if name not in free}
    assert graph == {}


def test_every_module_imports_on_a_bare_cpu_machine() -> None:
    """No module needs a GPU or an optional package at import, nor starts to work by being imported.

    Optional packages are hidden, so this also holds where they are installed.
    """
    code = f"""
import importlib, os, sys, threading
import torch  # looks for some of the optional packages itself

for name in {ABSENT_ON_A_CPU!r}:
    if name not in sys.modules:
        sys.modules[name] = None
for name in {sorted(MODULES)!r}:
    importlib.import_module(name)
assert not torch.distributed.is_initialized(), "an import joined a process group"
assert not torch.cuda.is_initialized(), "an import started CUDA"
print("imported", len({sorted(MODULES)!r}))
"""
    environment = {"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", "HOME": "/nonexistent"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"imported {len(MODULES)}" in done.stdout
