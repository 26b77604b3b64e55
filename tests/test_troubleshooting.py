"""docs/guides/troubleshooting.md has an entry for every message, and no entry for none.

An entry is a list item that begins with pieces of messages in backticks, `…` standing for a value:

    - `first piece`, `other piece` (warning): why, and what to do.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "guides" / "troubleshooting.md"
PACKAGES = ("foundation", "data_prep", "model", "pipeline")

VALUE = "…"
ERRORS = {
    "ConfigError",
    "MissingRankError",
    "DataError",
    "CheckpointError",
    "TrainingError",
    "BadRecordsError",
    "QuickstartError",
}
# Rules of configurations: validators raise ValueError, functions of this name give lines.
RULES = ("pipeline/config/", "pipeline/stages/", "pipeline/data/", "data_prep/building/", "model/")
_GIVES_PROBLEMS = re.compile(r"problem|unknown_key|_apply_override|_one_value")
_SHORTEST_PROBLEM = 20  # letters: below it is a part of a line, such as the name of a key
_FRAGMENTS = re.compile(r"- ((?:`[^`]+`,?\s+|`[^`]+`)+)(?:\([^)]*\))?:\s")


class Message(NamedTuple):
    """A message of the source: where it is, and its text with `…` for values."""

    place: str
    text: str


def _text_of(node: ast.expr) -> str:
    """The constant text of an expression; what is known at run time only becomes `…`."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[-.\d]*[sdrfg]", VALUE, node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            part.value if isinstance(part, ast.Constant) else VALUE  # type: ignore[misc]
            for part in node.values
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text_of(node.left) + _text_of(node.right)
    return VALUE


def _is_message(call: ast.Call, path: str) -> bool:
    """Whether a call makes an error for the user, or a line of the log that warns."""
    name = ast.unparse(call.func)
    if name.startswith("logger."):
        return name in ("logger.warning", "logger.error")
    last = name.rpartition(".")[2]
    return last in ERRORS or (last == "ValueError" and path.startswith(RULES))


def _strings(tree: ast.AST) -> Iterator[ast.expr]:
    """Whole strings below a node: parts of one are not given again, docstrings not at all."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.JoinedStr) or (
            isinstance(node, ast.Constant) and isinstance(node.value, str)
        ):
            yield node
        else:
            yield from _strings(node)


def messages_of(source: str, path: str) -> Iterator[Message]:
    """The messages of one file, without those that hold no text of their own.

    Args:
        source: Its content.
        path: Its path from the root of the repository.
    """
    found: list[tuple[ast.expr, str]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and node.args and _is_message(node, path):
            found.append((node, _text_of(node.args[0])))
        elif (
            isinstance(node, ast.FunctionDef)
            and _GIVES_PROBLEMS.search(node.name)
            and path.startswith(RULES)
        ):
            lines = [(string, _text_of(string)) for string in _strings(node)]
            found += [
                (string, text)
                for string, text in lines
                if " " in text and len(text) >= _SHORTEST_PROBLEM
            ]
    for where, text in found:
        words = " ".join(text.split())
        if re.search(r"[a-z]{2}", words):
            yield Message(f"{path}:{where.lineno}", words)


@cache
def _messages() -> tuple[Message, ...]:
    return tuple(
        message
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        for message in messages_of(path.read_text("utf-8"), path.relative_to(ROOT).as_posix())
    )


@cache
def _entries() -> tuple[tuple[str, ...], ...]:
    """The fragments of each entry of the page."""
    items = re.split(r"\n(?=- )|\n\n", PAGE.read_text("utf-8"))
    entries = []
    for item in items:
        if item.startswith("- `"):
            match = _FRAGMENTS.match(" ".join(item.split()))
            assert match, f"an entry is `pieces` of messages, a colon and words, not: {item}"
            entries.append(tuple(re.findall(r"`([^`]+)`", match[1])))
    return tuple(entries)


def _pattern(fragment: str) -> re.Pattern[str]:
    """A fragment matches with anything, or nothing, for each of its values."""
    return re.compile(".*?".join(re.escape(piece) for piece in fragment.split(VALUE)))


def uncovered(messages: tuple[Message, ...]) -> list[Message]:
    """Messages that no entry of the page quotes."""
    patterns = [_pattern(fragment) for entry in _entries() for fragment in entry]
    return [m for m in messages if not any(pattern.search(m.text) for pattern in patterns)]


def test_every_message_has_an_entry() -> None:
    """Whoever sees a message finds on the page why it comes and what to do."""
    assert len(_messages()) > 200, "the source is full of messages; few were found"
    missing = [f"{message.place}: {message.text}" for message in uncovered(_messages())]
    assert missing == [], f"write an entry in {PAGE.name} for:\n" + "\n".join(missing)


def test_every_entry_is_of_a_message() -> None:
    """An entry whose message was changed or removed is found, too."""
    strings = {message.text for message in _messages()}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            tree = ast.parse(path.read_text("utf-8"))
            strings |= {" ".join(_text_of(string).split()) for string in _strings(tree)}
    scripts = [path.read_text("utf-8") for path in (ROOT / "slurm").glob("*.sh")]
    strings |= {
        re.sub(r"\$\{[^}]*\}|\$\([^)]*\)|\$\w+", VALUE, line)
        for script in scripts
        for line in script.splitlines()
    }
    assert not any("\n" in text for text in strings), "no value goes past the end of a line"
    lines = "\n".join(strings)
    stale = [
        fragment
        for entry in _entries()
        for fragment in entry
        if not _pattern(fragment).search(lines)
    ]
    assert stale == [], f"no message has these any more: {stale}"


def test_fragments_say_something() -> None:
    """A fragment of one word would cover messages that nobody has written about."""
    short = [f for entry in _entries() for f in entry if len(re.findall(r"[A-Za-z]+", f)) < 2]
    assert short == [], f"too short: {short}"


@pytest.mark.parametrize(
    "source",
    [
        "raise DataError(f'{path} has grown a beard; shave it')",
        "raise CheckpointError('the disk ' + f'{name} has grown a beard')",
        "logger.warning('%s has grown a beard', path)",
        "def find_problems():\n    return [f'{key} has grown a beard by itself']",
    ],
)
def test_a_message_without_an_entry_is_found(source: str) -> None:
    """The check itself sees new messages in each form that the source uses."""
    found = tuple(messages_of(source, "pipeline/config/new.py"))
    assert [("has grown a beard" in message.text) for message in found] == [True]
    assert uncovered(found) == list(found)
