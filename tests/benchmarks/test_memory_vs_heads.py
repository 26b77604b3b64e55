"""The memory benchmark runs by path and writes its table and raw numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.saved_tensors import SavedTensorMeter

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.stress
def test_quick_run_writes_table_and_numbers(tmp_path: Path) -> None:
    """Saved bytes fall with the number of heads when sequential and rise in the joint step.

    Text outside the CPU's markers stays as it was.
    """
    readme = (ROOT / "benchmarks" / "README.md").read_text()
    (tmp_path / "README.md").write_text(readme)
    command = [sys.executable, str(ROOT / "benchmarks" / "memory_vs_heads.py"), "--quick"]
    subprocess.run(
        [*command, "--device", "cpu", "--heads", "1", "4", "--output", str(tmp_path)],
        check=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # threads only wait for one another here
        capture_output=True,
        timeout=300,
    )
    raw = json.loads((tmp_path / "results" / "memory_vs_heads-cpu.json").read_text())
    saved = {(point["mode"], point["heads"]): point["saved_bytes"] for point in raw["points"]}
    assert saved["sequential", 4] < saved["sequential", 1]
    assert saved["joint", 4] > 1.2 * saved["joint", 1]  # the vocabulary is small here
    assert all(point["peak_bytes"] >= point["saved_bytes"] for point in raw["points"])
    begin, end = ("<!-- memory_vs_heads cpu begin -->", "<!-- memory_vs_heads cpu end -->")
    written = (tmp_path / "README.md").read_text()
    assert written.split(begin)[0] == readme.split(begin)[0]
    assert written.split(end)[1] == readme.split(end)[1]
    table = written.split(begin)[1].split(end)[0]
    assert "| 4 | " in table


def test_meter_counts_each_storage_once_while_it_is_needed() -> None:
    """The docstring's example: exp(x) and y are kept for backward, and then nothing is."""
    x = torch.ones(100, requires_grad=True)
    y = torch.ones(100)
    with SavedTensorMeter() as meter:
        loss = (x.exp() * y).sum()
        assert meter.alive == 2 * 100 * 4
        loss.backward()
    assert (meter.alive, meter.peak) == (0, 2 * 100 * 4)
    with SavedTensorMeter(excluded=[y]) as meter:
        (x.exp() * y).sum().backward()
    assert meter.peak == 100 * 4
