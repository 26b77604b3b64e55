"""README.md names only what exists: paths, make targets, commands and their options."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Made by the commands, or named by the reader.
_MADE = ("runs", "data", ".venv", "raw")
_TOP = "|".join(
    (
        *("benchmarks", "configs", "data_prep", "foundation", "model", "pipeline", "slurm"),
        *("tests", r"\.ci", "docs"),
    )
)
_PATH = re.compile(rf"(?<![\w./-])((?:{_TOP})/[\w./-]*\w|[\w-]+\.(?:py|md|txt|toml|yaml|sh))\b")
_MODULE = re.compile(r"-m ((?:data_prep|model|pipeline)\.\w+)")
_SCRIPT = re.compile(r"python3? ((?:data_prep|model|pipeline|benchmarks)/[\w/]+\.py)")
_OPTION = re.compile(r"(?<![\w-])(--[a-z][a-z-]+)")


@cache
def _readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def _code() -> list[str]:
    """Lines of code blocks, with continued ones joined, and code within the text."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", _readme(), re.MULTILINE | re.DOTALL)
    lines = [
        line.strip()
        for block in blocks
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip()
    ]
    text = re.sub(r"^```\w*\n.*?^```", "", _readme(), flags=re.MULTILINE | re.DOTALL)
    return lines + re.findall(r"`([^`\n]+)`", text)


def _tree() -> set[str]:
    """Files and folders of the repository, each with its paths from every folder above it."""
    names = set()
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        if parts[0] in (*_MADE, ".git") or "__pycache__" in parts:
            continue
        names |= {"/".join(parts[start:]) for start in range(len(parts))}
    return names


@cache
def _help(command: tuple[str, ...]) -> str:
    done = subprocess.run(
        [sys.executable, *command, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)} --help: {done.stderr}"
    return done.stdout


def _commands() -> list[tuple[str, tuple[str, ...]]]:
    """Code that runs one of our modules or scripts, and how the interpreter is told to."""
    found: list[tuple[str, tuple[str, ...]]] = []
    for code in _code():
        if module := _MODULE.search(code):
            found.append((code[module.end() :], ("-m", module[1])))
        elif script := _SCRIPT.search(code):
            found.append((code[script.end() :], (script[1],)))
    return found


def test_every_path_in_the_readme_exists() -> None:
    """A file that moved is a README that lies."""
    tree = _tree()
    named = {path for code in _code() for path in _PATH.findall(code)}
    links = {link for link in re.findall(r"\]\(([^)#\s]+)", _readme()) if "://" not in link}
    assert {path for path in named | links if path.rstrip("/") not in tree} == set()
    assert len(named) >= 5, "the README shows the tree; the pattern finds none of it"


def test_every_make_target_in_the_readme_exists() -> None:
    """`make X` works for each X that is named."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for code in _code() for name in re.findall(r"(?:^|[;&] *)make ([a-z]+)", code)}
    assert named - targets == set()
    assert {"quickstart", "test"} <= named


def test_every_module_in_the_readme_can_be_asked_for_help() -> None:
    """Each command that is shown starts, and knows the options it is shown with."""
    unknown = {
        (" ".join(command), option)
        for code, command in _commands()
        for option in _OPTION.findall(code)
        if not re.search(rf"(?<![\w-]){option}(?![\w-])", _help(command))
    }
    assert unknown == set()
    assert _commands(), "the README shows no command of this repository"


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("*_*.sh")), ids=lambda p: p.name)
def test_readme_shows_each_slurm_script(script: Path) -> None:
    """A reader with a cluster finds the script."""
    assert f"slurm/{script.name}" in _readme()
