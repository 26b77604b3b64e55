"""The benchmark of texts runs by path, with every way of decoding, and measures what it says."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.decoding_quality import distinct, repeated
from benchmarks.decoding_ways import ways
from tests.support.tiny_export import export_tiny

ROOT = Path(__file__).resolve().parents[2]


def test_repetition_is_counted() -> None:
    """Of a text without any, of one that is nothing else, and of one that is too short."""
    assert repeated([1, 2, 3, 4, 5]) == 0
    assert repeated([1, 1, 1, 1, 1, 1]) == pytest.approx(2 / 3)
    assert distinct([1, 2, 1, 2, 1]) == pytest.approx(2 / 4)
    assert repeated([1, 2]) == 0
    assert distinct([1]) == 1


@pytest.mark.stress
def test_quick_run_prints_every_way(tmp_path: Path) -> None:
    """A row for each, with finite figures; the exact ones of a kind have one text."""
    export_tiny(tmp_path / "export")
    export_tiny(tmp_path / "draft", layers=3, future_tokens=1)
    command = [sys.executable, str(ROOT / "benchmarks" / "decoding_quality.py"), "--quick"]
    done = subprocess.run(
        [
            *(*command, str(tmp_path / "export"), "--draft", str(tmp_path / "draft")),
            *("--arithmetic", str(tmp_path / "export")),
        ],
        check=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    last = done.stdout[done.stdout.rindex("| decoding |") :].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in last]
    assert [row[0] for row in rows] == [way.name for way in ways(drafter=True, vocab_size=20)]
    figures = {row[0]: row[2:] for row in rows}
    assert figures["greedy"][0] == figures["self-speculation"][0]
    for row in rows:
        assert float(row[2]) < 0
        assert float(row[3]) > 1
        assert (int(row[8]) > 0) == ("draft model" in row[0])
        assert float(row[9]) >= 0
        assert (row[10] == "-") == ("draft model" in row[0])
