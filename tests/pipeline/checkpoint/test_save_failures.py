"""Saves that cannot be written: a healthy run goes on and says so, or stops, as it was told to."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.checkpoint.file_names import FOLDER, committed, step_of
from pipeline.checkpoint.files import verify
from pipeline.reporting.metrics import read_metrics
from tests.support.crash_runs import assert_whole
from tests.support.training_runs import run_job, start_job

WORLD = 2
RANK_FILE = 200_000  # bytes; a rank's tensors take twice as much, all else far less


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for some checkpoints of the tiny model."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (
        f"this test fills a disk of its own, and {' '.join(command)} failed: {done.stderr} Run the "
        "tests as root, or leave it out: ARGS='-k \"not full_disk\"'"
    )
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_one_rank_that_cannot_write_is_told_to_all(config: Path, tmp_path: Path) -> None:
    """Rank 1 cannot write its file: the save fails on all, the run goes on, and a later one works.

    The reason, the rank and what to do are in the log, the failure in the metrics.
    """
    run_dir = tmp_path / "run"
    settings = ["train.steps=40", "checkpoint.every_steps=2", "eval.every_steps=0"]
    arguments = [str(config), "--set", *settings, "checkpoint.asynchronous=false"]
    job = start_job(tmp_path, arguments, world=WORLD, file_limits={1: RANK_FILE})
    job.wait_until(lambda: "SAVE FAILED: step 4" in job.output(0))
    assert committed(run_dir / FOLDER) == []
    job.lift_file_limit(1)
    outcome = job.finish()
    assert outcome.codes == [0, 0], outcome.output
    line = next(line for line in outcome.output[0].splitlines() if "SAVE FAILED: step 2" in line)
    for words in ("rank 1: [Errno 27] File too large", "GiB free there", "no checkpoint yet"):
        assert words in line
    assert "goes on (checkpoint.on_error=warn) and saves again at step 4, or when it ends" in line
    failed = [record["step"] for record in read_metrics(run_dir) if record.get("save_failed")]
    assert len(failed) >= 1
    assert [step_of(path) for path in committed(run_dir / FOLDER)] == [38, 40]
    assert_whole(run_dir)
    assert [record["step"] for record in read_metrics(run_dir)] == list(range(1, 41))


def test_full_disk_costs_no_step_and_no_line(
    config: Path, small_disk: Path, tmp_path: Path
) -> None:
    """With metrics and logs on the full disk, too: the run goes on and has all lines at the end."""
    run_dir = small_disk / "run"
    settings = [f"run.dir={run_dir}", "train.steps=80", "checkpoint.every_steps=2"]
    arguments = [str(config), "--set", *settings, "eval.every_steps=0"]
    job = start_job(tmp_path, arguments, world=WORLD)
    job.wait_until(lambda: len(committed(run_dir / FOLDER)) == 2)
    filler = small_disk / "filler"
    _fill(filler)
    job.wait_until(lambda: "SAVE FAILED" in job.output(0) and "waits for room" in job.output(0))
    filler.unlink()
    outcome = job.finish()
    assert outcome.codes == [0, 0], outcome.output
    assert "No space left on device" in outcome.output[0]
    records = read_metrics(run_dir)
    assert [record["step"] for record in records] == list(range(1, 81))
    assert any(record.get("save_failed") for record in records)
    assert [step_of(path) for path in committed(run_dir / FOLDER)] == [78, 80]
    assert_whole(run_dir)


def _fill(path: Path) -> None:
    """Take all room there is, and again while the run gives some back."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


@pytest.mark.stress
def test_policy_stop_ends_the_run(config: Path, tmp_path: Path) -> None:
    """A file where the checkpoints' folder should be: all ranks stop with exit code 2.

    The error has the reason and what to do. With the file gone there are metrics of a run without
    checkpoints, so a start from the beginning has to be asked for.
    """
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / FOLDER).write_text("in the way")
    arguments = [str(config), "--set", "checkpoint.on_error=stop"]
    outcome = run_job(tmp_path, arguments, world=WORLD)
    assert outcome.codes == [2, 2]
    assert "step 3 could not be saved" in outcome.errors[0]
    assert "checkpoint.on_error=stop, so the run stops: make room" in outcome.errors[0]
    (run_dir / FOLDER).unlink()
    assert "--resume none" in run_job(tmp_path, arguments, world=WORLD).errors[0]
    assert run_job(tmp_path, [*arguments, "--resume", "none"], world=WORLD).codes == [0, 0]


def test_a_lost_last_save_is_no_success(config: Path, tmp_path: Path) -> None:
    """The last save fails: exit code 2 and a message, though the policy is to go on.

    Earlier checkpoints are untouched, and the same command finishes the run from the newest.
    """
    run_dir = tmp_path / "run"
    arguments = [str(config), "--set", "train.stop_at_step=3"]
    assert run_job(tmp_path, arguments, world=WORLD).codes == [0, 0]
    arguments = [str(config), "--set", "train.steps=5"]
    outcome = start_job(tmp_path, arguments, world=WORLD, file_limits={0: RANK_FILE}).finish()
    assert outcome.codes == [2, 2]
    for words in ("step 5 could not", "the last save of the run", "is step_00000003"):
        assert words in outcome.errors[0]
    assert verify(run_dir / FOLDER / "step_00000003") == []
    outcome = run_job(tmp_path, arguments, world=WORLD)
    assert outcome.codes == [0, 0]
    assert "step_00000003: step 3" in outcome.output[0]


@pytest.mark.stress
def test_best_by_validation_loss_survives_a_resume(config: Path, tmp_path: Path) -> None:
    """A run whose loss rises after a resume keeps the checkpoint from before, and every 6th."""
    run_dir = tmp_path / "run"
    settings = ["checkpoint.every_steps=2", "eval.every_steps=2", "checkpoint.keep_best=1"]
    arguments = [str(config), "--set", *settings, "checkpoint.keep_every=6"]
    assert run_job(tmp_path, [*arguments, "train.stop_at_step=4"]).codes == [0]
    assert run_job(tmp_path, [*arguments, "optimizer.learning_rate=1.0"]).codes == [0]
    losses = {
        int(record["step"] or 0): record["eval_loss"] or 0.0
        for record in read_metrics(run_dir)
        if record.get("eval_loss") is not None
    }
    assert min(losses, key=lambda step: losses[step]) == 4
    assert [step_of(path) for path in committed(run_dir / FOLDER)] == [4, 6, 10, 12]


@pytest.mark.stress
@pytest.mark.parametrize("on_error", ["warn", "stop"])
def test_a_run_folder_deleted_meanwhile(config: Path, tmp_path: Path, on_error: str) -> None:
    """It is noticed at the next step; the run goes on with a new folder, or stops, as told."""
    run_dir = tmp_path / "run"
    settings = ["train.steps=60", "checkpoint.every_steps=8", "eval.every_steps=0"]
    arguments = [str(config), "--set", *settings, f"checkpoint.on_error={on_error}"]
    job = start_job(tmp_path, arguments, world=WORLD)
    job.wait_until(lambda: bool(committed(run_dir / FOLDER)))
    run_dir.rename(tmp_path / "away")
    outcome = job.finish()
    assert "was deleted while the run went on" in outcome.output[0]
    if on_error == "stop":
        assert outcome.codes == [2, 2]
        # A save in flight may be the one that fails, else the next one says why.
        assert "checkpoint.on_error=stop, so the run stops" in outcome.errors[0]
        return
    assert outcome.codes == [0, 0], outcome.output
    assert [record["step"] for record in read_metrics(run_dir)] == list(range(1, 61))
    assert [step_of(path) for path in committed(run_dir / FOLDER)][-1] == 60
    assert_whole(run_dir)
