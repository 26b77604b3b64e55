"""The decoding benchmark runs by path; its arms give the same greedy texts."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_export import export_tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.stress
def test_quick_run_prints_every_arm(tmp_path: Path) -> None:
    """Chains, trees and both ways of transformers, greedy texts all equal; nothing is written."""
    readme = (ROOT / "benchmarks" / "README.md").read_text()
    export_tiny(tmp_path / "export")
    command = [sys.executable, str(ROOT / "benchmarks" / "decoding.py"), "--quick"]
    done = subprocess.run(
        [*command, str(tmp_path / "export")],
        check=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    last = done.stdout[done.stdout.rindex("| batch |") :].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in last]
    arms = {(row[0], row[1]): [r[2] for r in rows if r[:2] == row[:2]] for row in rows}
    chains = ["1 head", "chain of 2", "chain of 3", "chain of 4"]
    trees = [f"tree of {k}, spread 1" for k in (2, 3, 4)]
    auto = arms["1", "greedy"].pop()
    assert auto in [f"auto: {k} heads" for k in (2, 3, 4)] + ["auto: 1 head"]
    assert arms["1", "greedy"] == ["transformers", "prompt lookup", *chains, *trees]
    assert arms["2", "sampled"] == ["transformers", *chains, *trees]
    for row in rows:
        assert row[8] == ("yes" if row[1] == "greedy" else "-"), row
        assert float(row[4].replace(",", "")) > 0
    assert (ROOT / "benchmarks" / "README.md").read_text() == readme
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
