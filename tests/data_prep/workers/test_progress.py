"""The progress line of a build, as a log sees it."""

import io
import re
import time

import pytest
from rich.console import Console

from data_prep.workers.progress import ProgressLine


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the test sets."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_rates_and_the_time_left(clock: list[float]) -> None:
    """MB/s, tokens/s, rejects and what is left, at most one line in ten seconds."""
    written = io.StringIO()
    line = ProgressLine(Console(file=written, width=200))
    line.start("encoding", 100_000_000, 10)
    clock[0] += 5
    line.finish(10_000_000, 1_000_000, 2)
    assert "MB/s" not in written.getvalue()
    clock[0] += 5
    line.finish(10_000_000, 1_000_000, 1)
    assert written.getvalue().splitlines()[1] == (
        "encoding  20 % 20.0 MB at 2.0 MB/s, 2,000,000 tokens at 200,000 tokens/s, 3 rejects, "
        "0:00:40 left"
    )
    clock[0] += 10
    line.finish(80_000_000, 0, 0)
    line.close()
    assert written.getvalue().splitlines()[-1].startswith("encoding: 100.0 MB at 5.0 MB/s")


def test_what_others_did_is_not_ours(clock: list[float]) -> None:
    """Work that another task did shortens the rest and does not raise the rate."""
    written = io.StringIO()
    line = ProgressLine(Console(file=written, width=200))
    line.start("encoding", 100_000_000, 10)
    line.skip(60_000_000)
    clock[0] += 10
    line.finish(10_000_000, 0, 0)
    assert written.getvalue().splitlines()[-1] == "encoding  25 % 10.0 MB at 1.0 MB/s, 0:00:30 left"


def test_phases_start_from_zero(clock: list[float]) -> None:
    """The rates of one phase do not leak into the next, and each is summed up when it ends."""
    written = io.StringIO()
    line = ProgressLine(Console(file=written, width=200))
    line.start("hashing", 50_000_000, 5)
    clock[0] += 5
    line.finish(50_000_000, 0, 0)
    line.start("encoding", 50_000_000, 5)
    clock[0] += 20
    line.finish(25_000_000, 7, 0)
    line.close()
    lines = written.getvalue().splitlines()
    assert lines[1] == "hashing: 50.0 MB at 10.0 MB/s in 5.0 s"
    assert lines[3].startswith("encoding  50 % 25.0 MB at 1.2 MB/s")


@pytest.mark.parametrize(("width", "rates"), [(60, ""), (80, "MB of text"), (200, "tokens/s")])
def test_a_terminal_of_any_width_keeps_the_bar(
    width: int, rates: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What there is no room for is left out; the bar, the share and the time left are not."""
    monkeypatch.setenv("TERM", "xterm")
    written = io.StringIO()
    line = ProgressLine(Console(file=written, width=width, force_terminal=True))
    line.start("comparing hashes", 9_000_000_000_000, 10)
    line.finish(3_000_000_000_000, 750_000_000_000, 20_000)
    line.reading(4_000_000_000_000)
    line._bar.refresh()
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.getvalue()).split("\r")[-1].strip()
    line.close()
    assert "━━━━━" in last
    assert " 33 %" in last
    assert rates in last
    assert last.startswith("comparing hashes ")
    assert len(last) <= width
    assert "…" not in last


def test_a_long_unit_gives_signs_of_life(clock: list[float]) -> None:
    """A log gets a line in ten seconds also while no unit is finished."""
    written = io.StringIO()
    line = ProgressLine(Console(file=written, width=200))
    line.start("encoding", 100_000_000, 1)
    for _ in range(4):
        clock[0] += 5
        line.reading(30_000_000)
    line.close()
    assert (
        written.getvalue().splitlines()[1:]
        == ["encoding: 30.0 MB of text read, 0.0 of 100.0 MB of input done"] * 2
    )
