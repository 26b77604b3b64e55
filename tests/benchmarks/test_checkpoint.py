"""The checkpoint benchmark runs by path and writes its table and raw numbers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.stress
def test_quick_run_writes_table_and_numbers(tmp_path: Path) -> None:
    """Every figure of the table is there; text outside the markers stays, and no files are left."""
    readme = (ROOT / "benchmarks" / "README.md").read_text()
    (tmp_path / "README.md").write_text(readme)
    command = [sys.executable, str(ROOT / "benchmarks" / "checkpoint.py"), "--quick"]
    command += ["--output", str(tmp_path), "--folder", str(tmp_path)]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, timeout=300)
    ranks = json.loads((tmp_path / "results" / "checkpoint-cpu.json").read_text())["ranks"]
    assert len(ranks) == 2
    for rank in ranks:
        assert rank["model"]["bytes"] == 12 * rank["model"]["parameters"]
        assert 0 < rank["async_0"]["wait_s"] <= rank["async_0"]["total_s"]
        assert rank["conversion"]["wait_s"] > 0
    begin, end = ("<!-- checkpoint cpu begin -->", "<!-- checkpoint cpu end -->")
    written = (tmp_path / "README.md").read_text()
    assert written.split(begin)[0] == readme.split(begin)[0]
    assert written.split(end)[1] == readme.split(end)[1]
    assert "| loaded in another layout (2 tensor) |" in written.split(begin)[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "results"]
