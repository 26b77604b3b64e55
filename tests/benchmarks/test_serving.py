"""The serving benchmark runs by path; its servers give the same greedy texts."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_export import export_tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.stress
def test_quick_run_prints_a_row_for_each_server(tmp_path: Path) -> None:
    """Our server at least; that of transformers where it is installed. Nothing is written."""
    readme = (ROOT / "benchmarks" / "README.md").read_text()
    export_tiny(tmp_path / "export")
    command = [sys.executable, str(ROOT / "benchmarks" / "serving.py"), "--quick"]
    done = subprocess.run(
        [*command, str(tmp_path / "export")],
        check=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
    )
    last = done.stdout[done.stdout.rindex("| server |") :].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in last]
    assert rows[0][0] == "model.serve, 1 head"
    for row in rows:
        assert float(row[1].replace(",", "")) > 0
        assert row[5] == "100%", row
    assert (ROOT / "benchmarks" / "README.md").read_text() == readme
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
