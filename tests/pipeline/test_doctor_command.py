"""`pipeline.doctor` from outside, in real ranks: its lines, its exit status, what it leaves."""

import os
import signal
from pathlib import Path

import pytest

from tests.support.training_runs import Outcome, RunningJob, start_job

CHECKS = (
    *("ports", "devices", "versions", "clocks", "all-reduce", "ring", "layout", "data", "shards"),
    *("run.dir", "file system", "disk", "gradients"),
)


def _start(tmp_path: Path, arguments: list[str], world: int, **more: object) -> RunningJob:
    output = tmp_path / "output"
    output.mkdir()
    return start_job(output, arguments, world=world, module="pipeline.doctor", **more)  # type: ignore[arg-type]


def _lines(outcome: Outcome) -> dict[str, str]:
    """The line of each check of rank 0, by name."""
    found = {}
    for line in outcome.output[0].splitlines():
        for name in CHECKS:
            if line.startswith((f"ok    {name} ", f"mend  {name} ")):
                found[name] = line
    return found


def test_one_process_alone_is_told_that_all_is_well(config: Path, tmp_path: Path) -> None:
    """Every check has its line; the run's folder, which was not there, is not there again."""
    outcome = _start(tmp_path, [str(config), "--full"], world=1).finish()
    assert outcome.codes == [0], outcome.output
    lines = _lines(outcome)
    assert tuple(lines) == CHECKS
    assert "whole" in lines["shards"]
    assert outcome.output[0].splitlines()[-1] == "OK"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "layout",
    [
        ("parallel.tensor=2", "parallel.zero=1"),
        pytest.param(("parallel.zero=3",), marks=pytest.mark.stress),
        pytest.param(("parallel.stages=auto:2", "train.precision=bf16"), marks=pytest.mark.stress),
    ],
)
def test_ranks_check_their_layout_and_touch_no_run(
    config: Path, tmp_path: Path, layout: tuple[str, ...]
) -> None:
    """Gradients of the layout agree with one process; another run's files stay as they are."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    lease = run_dir / "lease.json"
    lease.write_text('{"pid": 1, "token": "of a run that goes on"}')
    before = (sorted(run_dir.iterdir()), lease.read_bytes(), lease.stat().st_mtime_ns)
    outcome = _start(tmp_path, [str(config), "--steps", "1", "--set", *layout], world=2).finish()
    assert outcome.codes == [0, 0], outcome.output
    lines = _lines(outcome)
    assert tuple(lines) == CHECKS
    assert "right" in lines["all-reduce"]
    assert "right" in lines["ring"]
    assert "gradients of this layout" in lines["gradients"]
    assert "layers at full width: step 1 in" in outcome.output[0]
    assert not [line for line in outcome.output[1].splitlines() if line.startswith(("ok", "OK"))]
    assert (sorted(run_dir.iterdir()), lease.read_bytes(), lease.stat().st_mtime_ns) == before


def test_a_rank_with_another_folder_and_configuration_is_named(
    config: Path, tmp_path: Path
) -> None:
    """As on a node that does not mount the storage; all faults are listed at the end."""
    elsewhere = tmp_path / "elsewhere"
    outcome = _start(
        tmp_path,
        [str(config), "--time-limit", "40"],
        world=2,
        more_arguments={1: ["--set", f"run.dir={elsewhere}"]},
    ).finish()
    assert outcome.codes == [1, 1], outcome.output
    _, _, faults = outcome.output[0].partition("to mend:\n")
    assert "has another configuration than rank 0" in faults
    assert "rank 1 on " in faults
    assert "is not the folder that rank 0 sees" in faults
    assert "gradients" not in _lines(outcome)
    assert not elsewhere.exists()
    assert not (tmp_path / "run").exists()


def test_missing_shards_do_not_keep_other_checks(config: Path, tmp_path: Path) -> None:
    """One fault is one line; what does not depend on it goes on."""
    arguments = [str(config), "--set", f"data.shards={tmp_path / 'nowhere'}"]
    outcome = _start(tmp_path, arguments, world=1).finish()
    assert outcome.codes == [1]
    lines = _lines(outcome)
    assert lines["data"].startswith("mend")
    assert lines["disk"].startswith("ok")
    assert "nowhere" in outcome.output[0].partition("to mend:\n")[2]


def test_ranks_that_the_layout_cannot_use_are_refused(config: Path, tmp_path: Path) -> None:
    """With the message of a run."""
    arguments = [str(config), "--set", "parallel.stages=auto:3"]
    outcome = _start(tmp_path, arguments, world=2).finish()
    assert outcome.codes == [1, 1]
    assert "mend  layout" in outcome.output[0]
    assert "do not divide the world size of 2 ranks" in outcome.output[0]


@pytest.mark.stress
def test_a_rank_that_hangs_is_named_and_ends_the_job(config: Path, tmp_path: Path) -> None:
    """A frozen process answers nothing; nothing is left behind all the same."""
    job = _start(tmp_path, [str(config), "--time-limit", "8"], world=2)
    try:
        job.wait_until(lambda: "ok    ports" in job.output(0))
        job.kill(1, signal.SIGSTOP)
        job.wait_until(lambda: not job.is_alive(0) or "error:" in job.output(0))
        assert "did not end within" in job.output(0)
        assert f"rank 1 on {os.uname().nodename}" in job.output(0)
    finally:
        job.kill(1, signal.SIGKILL)
    outcome = job.finish()
    assert outcome.codes[0] == 1
    assert not (tmp_path / "run").exists()


def test_a_rank_that_is_killed_ends_the_job_at_once(config: Path, tmp_path: Path) -> None:
    """The others say which check it was, long before the time limit, and clean up."""
    job = _start(tmp_path, [str(config)], world=2)
    job.wait_until(lambda: "ok    ports" in job.output(0))
    job.kill(1)
    outcome = job.finish(60)
    assert outcome.codes[0] == 1
    assert "broke off" in outcome.output[0]
    assert "Traceback" not in outcome.output[0]
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_named(config: Path, tmp_path: Path) -> None:
    """A file is in the way."""
    (tmp_path / "file").touch()
    arguments = [str(config), "--set", f"run.dir={tmp_path / 'file' / 'run'}"]
    outcome = _start(tmp_path, arguments, world=1).finish()
    assert outcome.codes == [1]
    assert "cannot be written on the node of rank 0" in outcome.output[0]
