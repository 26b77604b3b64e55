"""Hostile input ends in success or in one clear error: no traceback, hang or changed file."""

import contextlib
import io
import re
import resource
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.errors import DataError
from model.errors import CheckpointError, ConfigError
from tests.support.long_forms import part_of

ERRORS = (ConfigError, DataError, CheckpointError)
ALL = list(HealthCheck)
CASE_LIMIT_S = 10.0
CASE_LIMIT_BYTES = 2 << 30
_LONGEST_LINE = 2000
# What a terminal would act on, or could not show at all.
_NOT_SHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


Test = Callable[..., None]
_STRESS = 50  # times as many examples as `make test` tries


def fuzzed(examples: int, **strategies: st.SearchStrategy[Any]) -> Callable[[Test], Test]:
    """Make a property test of a function that has fixtures beside the arguments that are drawn.

    `make test` tries the same few examples each time, `make stress` many others.
    """

    def decorate(test: Test) -> Test:
        settings_of = partial(settings, deadline=None, database=None, suppress_health_check=ALL)
        drawn = given(**strategies)
        few = settings_of(max_examples=examples, derandomize=True)(drawn(test))
        many = settings_of(max_examples=_STRESS * examples)(drawn(test))

        @pytest.mark.parametrize("run", part_of((few, many), lambda number, _: number == 0))
        def form(run: Test, **fixtures: object) -> None:
            run(**fixtures)

        names = [name for name in signature(test).parameters if name not in strategies]
        kept = [Parameter(name, Parameter.KEYWORD_ONLY) for name in ("run", *names)]
        form.__signature__ = Signature(kept)  # type: ignore[attr-defined]
        form.__doc__ = test.__doc__
        return form

    return decorate


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    output: str
    errors: str


@contextlib.contextmanager
def limits(seconds: float = CASE_LIMIT_S, extra_bytes: int = CASE_LIMIT_BYTES) -> Iterator[None]:
    """Fail what is inside when it takes longer, or needs so much more memory."""

    def stop(*_: object) -> None:
        raise AssertionError(f"not finished after {seconds} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def refusal_of(function: Callable[[], object]) -> str | None:
    """Call within the limits: None when it succeeds, else the text of its one clear error."""
    with limits():
        try:
            function()
        except ERRORS as error:
            text = str(error)
        else:
            return None
    check_message(text)
    return text


def check_message(text: str) -> None:
    """One line, or a head and a list, short enough to read and free of control characters."""
    first, *rest = text.split("\n")
    assert first.strip(), "an error without words"
    assert all(line.startswith("  - ") for line in rest), f"more than one error: {text!r}"
    assert not _NOT_SHOWN.search(text), f"control characters in {text!r}"
    assert max(map(len, (first, *rest))) <= _LONGEST_LINE, f"{len(text)} letters: {text[:200]!r}"


def call_command(main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> Ended:
    """Call a command's function within the limits, and check how it ended."""
    output, errors = io.StringIO(), io.StringIO()
    with limits(), contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            code = main(arguments)
        except SystemExit as end:  # of argparse
            code = end.code if isinstance(end.code, int) else 1
    ended = Ended(code, output.getvalue(), errors.getvalue())
    check_ended(ended)
    return ended


def check_ended(ended: Ended) -> None:
    """Exit code 0, or another one with at most one error, which is clear."""
    assert "Traceback" not in ended.output + ended.errors, ended.errors
    errors = re.split(r"^(?:usage:[\s\S]*?)?(?:[\w. -]+: )?error: ", ended.errors, flags=re.M)[1:]
    assert len(errors) <= 1, f"more than one error: {ended.errors}"
    assert not (ended.code == 0 and errors), f"exit code 0 with {ended.errors}"
    assert ended.code == 0 or errors or ended.output, f"exit code {ended.code} without a word"
    for text in errors:
        check_message(text.rstrip("\n"))


@contextlib.contextmanager
def untouched(folder: Path) -> Iterator[None]:
    """Check that what is inside leaves every file below the folder as it was, and adds none."""
    before = _facts(folder)
    yield
    assert _facts(folder) == before


def _facts(folder: Path) -> dict[str, tuple[int, int, int]]:
    found = {}
    for path in sorted(folder.rglob("*")):
        facts = path.lstat()
        times = (0, 0) if path.is_dir() else (facts.st_size, facts.st_mtime_ns)
        found[str(path)] = (facts.st_mode, *times)
    return found
