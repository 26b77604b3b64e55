"""`benchmarks/gpu.sh` on a CPU: it measures, keeps what it has, and does not measure twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_pieces
from benchmarks.gpu import main
from benchmarks.gpu_pieces import Budget, outcomes_of_tests, points
from benchmarks.gpu_points import Point
from benchmarks.gpu_processes import Waiting
from benchmarks.gpu_tables import planned_gib
from pipeline.config.run_config import RunConfig

ROOT = Path(__file__).parents[2]


def test_every_point_is_a_valid_run() -> None:
    """In the sizes for a GPU and in the tiny ones, and no piece is empty."""
    for size in ("1b", "tiny"):
        for piece in (
            *("heads", "memory", "zero", "checkpointing", "chunk", "documents", "joint"),
            *("attention", "compile"),
        ):
            found = points(piece, size)
            assert found or (piece, size) == ("attention", "tiny")
            for point in found:
                for device in ("cuda", "cpu"):
                    RunConfig.model_validate(point.configuration(device))


def test_the_sizes_are_what_they_are_called() -> None:
    """0.3, 1.3 and 3 billion parameters, whatever the number of heads."""
    for size, least, most in (("0.3b", 0.2e9, 0.35e9), ("1b", 1.2e9, 1.5e9), ("3b", 2.6e9, 3.4e9)):
        counts = set()
        for heads in (1, 2, 4, 8):
            config = RunConfig.model_validate(Point(size, heads=heads).configuration("cuda"))
            counts.add(config.model.parameter_count().total)
        assert len(counts) == 1
        assert least < counts.pop() < most


def test_every_point_fits_into_80_gb() -> None:
    """By the plan, beside what CUDA, its libraries and holes take; so does the largest size."""
    for piece in ("heads", "joint", "memory", "zero", "checkpointing", "chunk", "documents"):
        for point in points(piece, "1b"):
            assert planned_gib(point) < 72, point


def test_a_run_that_was_cut_off_is_neither_complete_nor_a_failure() -> None:
    """The next call runs it again."""
    kept: list[dict[str, object]] = []
    gpu_pieces._run_a_run("cpu", "tiny", Budget(0), {}, kept.append)
    assert kept == [{"failures": [], "complete": False}]


def test_a_call_goes_on_where_the_last_one_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two points of which one was measured; a failing one is reported, and nothing is lost."""
    two = [Point("tiny", micro=1, accumulation=1, sequence=32, vocabulary=64, steps=1)]
    two.append(Point("tiny", heads=99, micro=1))  # more heads than layers: refused
    monkeypatch.setattr(gpu_pieces, "points", lambda *_: two)
    arguments = ["--device", "cpu", "--tiny", "--only", "zero", "--output", str(tmp_path)]
    assert main([*arguments, "--minutes", "5"]) == 1
    path = tmp_path / "results" / "gpu-cpu-tiny" / "zero.json"
    found = json.loads(path.read_text())
    assert found["complete"]
    assert len(found["failures"]) == 1
    row = found["rows"][str(two[0])]
    assert row["tokens_per_s"] > 0
    assert row["peak_gib"] > 0
    assert "| tiny | 4 | 1 | 1 x 32 |" in capsys.readouterr().out
    before = path.stat().st_mtime_ns
    assert Waiting("cpu").measure(two[0], False, left_s=0.1) is None  # not measured, no failure
    assert main([*arguments, "--minutes", "0"]) == 1
    assert path.stat().st_mtime_ns == before
    assert "measured before, and failed; --again measures that again" in capsys.readouterr().out


@pytest.mark.stress
def test_the_whole_script_on_a_cpu(tmp_path: Path) -> None:
    """Every piece, in its tiny size."""
    command = ["benchmarks/gpu.sh", "--device", "cpu", "--tiny", "--minutes", "30"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
        timeout=2400,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


@pytest.mark.parametrize("options", [[], ["-n", "2"]])
def test_outcomes_of_tests_are_read_whether_they_ended_or_not(
    tmp_path: Path, options: list[str]
) -> None:
    """From one worker or several, of a run that was killed too."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('case', ['a b', 'c, zero 3'])\n"
        "def test_good(case): pass\n"
        "def test_bad(): assert 0\n"
        "def test_left_out(): pytest.skip('for a reason')\n"
    )
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *options, "tests"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    wanted = {
        "tests/test_some.py::test_good[a b]": "PASSED",
        "tests/test_some.py::test_good[c, zero 3]": "PASSED",
        "tests/test_some.py::test_bad": "FAILED",
        "tests/test_some.py::test_left_out": "SKIPPED",
    }
    assert outcomes_of_tests(done.stdout) == wanted
    cut_off = done.stdout[: done.stdout.index("test_bad")]
    assert outcomes_of_tests(cut_off).items() <= wanted.items()
