"""README, pages and CONTRIBUTING name only what exists: blocks, paths, links, keys, commands."""

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

from data_prep.building.data_config import read_config
from data_prep.errors import DataError
from docs.extensions.commands import MODULES, refusal
from model.errors import ConfigError
from pipeline.config.run_config import known_keys, load_config
from tests.support.page_blocks import (
    LANGUAGES,
    NEEDS,
    ROOT,
    UNMARKED,
    Block,
    all_blocks,
    blocks_of,
    pages,
    prose,
)

BLOCKS = all_blocks()
COMMAND_BLOCKS = [block for block in BLOCKS if block.language == "bash"]
_FOLDERS = "benchmarks|configs|data_prep|docs|examples|foundation|model|pipeline|slurm|tests"
_PATH = re.compile(rf"(?<![\w./*-])((?:{_FOLDERS})/[\w./-]*\w|(?:{_FOLDERS})/)(?![\w*])")
_SECTIONS = sorted({key.partition(".")[0] for key in known_keys()})
_KEY = re.compile(rf"^({'|'.join(_SECTIONS)})\.([a-z_]+)")
_WORD = re.compile(r"`([^`\n]+)`")
_ASSIGNMENT = re.compile(r"^[A-Za-z_]\w*=")


@cache
def _tree() -> frozenset[str]:
    """Files and folders of the repository, each by its path from the root."""
    names = set()
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        if parts[0] not in ("runs", "data", ".git", ".venv") and "__pycache__" not in parts:
            names.add("/".join(parts))
    return frozenset(names)


def test_there_are_blocks_to_check() -> None:
    """The pages are found, and blocks with every kind of marker; nothing passes on nothing."""
    names = {str(path.relative_to(ROOT)) for path in pages()}
    assert {"README.md", "CONTRIBUTING.md", "docs/index.md", "docs/reference/files.md"} <= names
    assert {"bash", "python", "yaml", "text"} <= {block.language for block in BLOCKS}
    assert {"run", "needs", "file"} <= {block.kind for block in BLOCKS}


@pytest.mark.parametrize("path", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_block_has_a_language_and_a_marker(path: Path) -> None:
    """What a reader may type or copy says whether it is run, and if not, why."""
    faults = [fault for block in blocks_of(path) if (fault := _fault(block))]
    assert faults == []
    assert re.findall(r"(?<=\n\n)    \S.*", prose(path)) == [], "indented code has no marker"


def _fault(block: Block) -> str | None:
    """What is wrong with a block's language or marker."""
    if block.language not in LANGUAGES:
        return f"{block.where}: language {block.language!r} is none of {', '.join(LANGUAGES)}"
    if not block.kind:
        marked = block.language in UNMARKED
        return None if marked else f"{block.where}: no marker above; see docs/README.md"
    allowed = {
        "run": ("bash", "python"),
        "file": ("yaml", "python"),
        "part of": ("yaml",),
        "run by": ("bash", "python"),
        "needs": ("bash", "python"),
    }[block.kind]
    if block.language not in allowed:
        return f"{block.where}: {block.kind!r} is for {' and '.join(allowed)} blocks"
    wrong = _value_fault(block)
    return f"{block.where}: {wrong}" if wrong else None


def _value_fault(block: Block) -> str | None:
    value = block.value
    if block.kind == "needs" and (set(value.split(", ")) - set(NEEDS) or not value):
        return f"needs {value!r}; the words are {', '.join(NEEDS)}"
    if block.kind == "run" and not re.fullmatch(r"(exits \d+)?", value):
        return f"run: {value!r}; write `exits N` or nothing"
    if block.kind == "part of" and value not in ("run", "data"):
        return f"part of {value!r}; it is run or data"
    if block.kind == "file" and not value:
        return "a file needs a name"
    if block.kind == "run by" and value.partition("::")[0] not in _tree():
        return f"{value} does not exist"
    return None


@pytest.mark.parametrize("path", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_named_paths_and_links_exist(path: Path) -> None:
    """A file that moved is a page that lies: in backticks, in links and in text blocks."""
    text = prose(path)
    code = [*_WORD.findall(text), *(b.text for b in blocks_of(path) if b.language == "bash")]
    named = {found.rstrip("/") for words in code for found in _PATH.findall(words)}
    named -= {name for name in named if name.split("/")[0] == "data"}
    assert {name for name in named if name not in _tree()} == set()
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    missing = {
        link for link in links if "://" not in link and not (path.parent / link).resolve().exists()
    }
    assert missing == set()


@pytest.mark.parametrize("path", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_named_configuration_keys_exist(path: Path) -> None:
    """`section.key` in backticks is a key of a run."""
    known = set(known_keys())
    named = {f"{m[1]}.{m[2]}" for word in _WORD.findall(prose(path)) if (m := _KEY.match(word))}
    # The file name of a page or of a module of that name is no key.
    assert {key for key in named - known if not _is_file(key)} == set()


def _is_file(key: str) -> bool:
    return key.rpartition(".")[2] in ("py", "md", "yaml", "json", "jsonl", "html", "log")


@pytest.mark.parametrize("block", COMMAND_BLOCKS, ids=lambda block: block.where)
def test_commands_know_their_options(block: Block) -> None:
    """Each command's parser takes the arguments that it is shown with; targets and files exist."""
    faults = [fault for line in _lines(block) for fault in _command_faults(line)]
    assert faults == []


def _lines(block: Block) -> Iterator[list[str]]:
    """The words of each simple command, without assignments in front and what follows a pipe."""
    for line in block.text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>()")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in lexer:
            if set(word) <= set("|&;()"):
                yield _without_assignments(words)
                words = []
            else:
                words.append(word)
        yield _without_assignments(words)


def _without_assignments(words: list[str]) -> list[str]:
    while words and _ASSIGNMENT.match(words[0]):
        words = words[1:]
    if any(word in (">", ">>", "<") for word in words):
        words = words[: next(i for i, word in enumerate(words) if word in (">", ">>", "<"))]
    return words


def _command_faults(words: list[str]) -> Iterator[str]:
    """What is wrong with one command of a block."""
    if not words:
        return
    shown = shlex.join(words)
    if words[0] == "make":
        targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        yield from (
            f"make {w}: no such target" for w in words[1:] if w.isalpha() and w not in targets
        )
    if words[0] == "sbatch":
        script = next((word for word in words if word.endswith(".sh")), "")
        if script not in _tree():
            yield f"{shown}: {script!r} is no script of ours"
        if script == "slurm/pretrain_7b.sh":
            rest = words[words.index(script) + 1 :]
            default = [] if rest and not rest[0].startswith("-") else ["configs/7b.yaml"]
            yield from _module_faults("pipeline.train", [*default, *rest])
    module, arguments = _module_of(words)
    if module:
        yield from _module_faults(module, arguments)


def _module_of(words: list[str]) -> tuple[str, list[str]]:
    """The module of ours that a command runs, and its arguments; "" for another command."""
    for index, word in enumerate(words):
        if word == "-m" and words[index + 1].split(".")[0] in _FOLDERS.split("|"):
            return words[index + 1], words[index + 2 :]
        if word.endswith(".py") and word in _tree() and not word.startswith("docs/"):
            return word.removesuffix(".py").replace("/", "."), words[index + 1 :]
    return "", []


def _module_faults(module: str, arguments: list[str]) -> Iterator[str]:
    path = f"{module.replace('.', '/')}.py"
    if path not in _tree() and f"{module.replace('.', '/')}/__main__.py" not in _tree():
        yield f"{module} does not exist"
    if module not in MODULES or "--help" in arguments:
        return
    if module == "pipeline.submit" and "--" in arguments:  # what follows is sbatch's
        arguments = arguments[: arguments.index("--")]
    if refused := refusal(module, arguments):
        yield f"{module} {shlex.join(arguments)}: {refused}"
    elif module in ("pipeline.train", "pipeline.submit"):
        yield from _run_faults(arguments)


def _run_faults(arguments: list[str]) -> Iterator[str]:
    """Whether the run that a training command names is a valid one."""
    config = arguments[0]
    if not config.startswith("configs/") or "$" in config:
        return  # written by a block of the page, which the sandbox runs
    settings: list[str] = []
    taking = False
    for word in arguments[1:]:
        taking = word == "--set" or (taking and not word.startswith("--"))
        settings += [word] if taking and word != "--set" else []
    try:
        load_config(ROOT / config, [word for word in settings if "$" not in word])
    except ConfigError as error:
        yield f"{shlex.join(arguments)}: {error}"


@pytest.mark.parametrize(
    "block",
    [block for block in BLOCKS if block.language in ("python", "yaml")],
    ids=lambda block: block.where,
)
def test_python_compiles_and_yaml_has_known_keys(block: Block, tmp_path: Path) -> None:
    """Fragments, too: what a reader copies is syntax, and every key of it exists."""
    if block.language == "python":
        ast.parse(block.text)
        return
    content = yaml.safe_load(block.text)
    assert isinstance(content, dict), "a configuration is a mapping"
    if block.kind == "part of" and block.value == "run":
        known = set(known_keys())
        keys = {f"{name}.{key}" for name, section in content.items() for key in section}
        assert keys <= known
    elif block.kind == "part of":
        fragment = tmp_path / "fragment.yaml"
        fragment.write_text(block.text)
        said = ""
        try:
            read_config(fragment)
        except DataError as error:
            said = str(error)
        assert "known key" not in said


SCRIPTS = sorted(path for path in (ROOT / "slurm").glob("*.sh") if path.name != "supervise.sh")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_readme_names_each_slurm_script(script: Path) -> None:
    """A reader with a cluster finds the scripts."""
    assert f"slurm/{script.name}" in (ROOT / "README.md").read_text(encoding="utf-8")
