"""How jobs end, or are queued again."""

import json
import signal
import time
from pathlib import Path

import pytest

from tests.slurm.stand_ins import STARTED, Job


@pytest.mark.parametrize("step_status", [1, 2, 75, 143])
def test_exit_status_of_the_step_is_the_jobs(pretrain: Job, step_status: int) -> None:
    """A failed step is a failed job, with the same status, and is not queued again by itself."""
    status, output = pretrain.run(STEP_STATUS=str(step_status))
    assert status == step_status, output
    assert not (pretrain.record / "requeued").exists()


@pytest.mark.parametrize("step_status", [75, 143])
@pytest.mark.parametrize(
    ("environment", "queued"),
    [
        ({"SLURM_RESTART_COUNT": "1"}, True),
        ({"SLURM_RESTART_COUNT": "1", "FAKE_STATE": "CANCELLED"}, False),
        ({"SLURM_RESTART_COUNT": "0"}, False),
    ],
)
def test_a_late_end_of_the_start_before_does_not_end_this_one(
    pretrain: Job, environment: dict[str, str], queued: bool, step_status: int
) -> None:
    """Steps of all starts have the same number: one that ends early is queued again."""
    status, output = pretrain.run(STEP_STATUS=str(step_status), **environment)
    assert (pretrain.record / "requeued").exists() == queued, output
    assert status == (-signal.SIGKILL if queued else step_status)


def test_time_limit_warning_reaches_the_tasks_and_queues_again(pretrain: Job) -> None:
    """USR1 is handed on, the step's end is waited for, and the same job id goes on later."""
    status, output = pretrain.signal_step(signal.SIGUSR1)
    assert (pretrain.record / "signals").read_text() == "USR1\n"
    assert "srun ended with status 75" in output
    assert (pretrain.record / "requeued").read_text() == "1234567\n"
    assert status == -signal.SIGKILL


@pytest.mark.parametrize("step_status", [0, 1])
def test_a_run_that_ended_at_the_warning_is_not_queued_again(
    pretrain: Job, step_status: int
) -> None:
    """Done is done, and a failure to save would only repeat itself."""
    status, output = pretrain.signal_step(signal.SIGUSR1, STATUS_ON_USR1=str(step_status))
    assert status == step_status, output
    assert not (pretrain.record / "requeued").exists()


def test_cancelling_waits_for_the_save_and_does_not_queue_again(pretrain: Job) -> None:
    """TERM reaches the tasks, which save; the job ends with their status."""
    status, output = pretrain.signal_step(signal.SIGTERM)
    assert status == 75, output
    assert "stopped on request" in output
    assert not (pretrain.record / "requeued").exists()


def test_a_killed_srun_is_started_again(pretrain: Job) -> None:
    """Nobody asked for that, and nothing of the run is at fault."""
    _, output = pretrain.run(STEP_STATUS="137")
    assert (pretrain.record / "requeued").read_text() == "1234567\n"
    assert "srun was killed" in output


def test_a_job_that_is_queued_again_goes_on(pretrain: Job) -> None:
    """It was to begin anew once, and not at each requeue."""
    status, output = pretrain.run("--resume", "none", RANKS_PER_NODE="1")
    assert status == 0, output
    assert pretrain.srun_arguments()[-2:] == ["--resume", "none"]
    status, output = pretrain.run("--resume", "none", RANKS_PER_NODE="1", SLURM_RESTART_COUNT="1")
    assert status == 0, output
    assert pretrain.srun_arguments()[-2:] == ["--resume", "auto"]


def test_a_job_without_progress_is_stopped_with_the_reason(pretrain: Job) -> None:
    """Requeues that the job asked for are counted until there is a new checkpoint."""
    run_dir = pretrain.record / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    for number in range(3):
        pretrain.signal_step(signal.SIGUSR1)
        assert (pretrain.record / "requeued").exists(), number
        (pretrain.record / "requeued").unlink()
        (pretrain.record / STARTED).unlink()
        if number == 0:
            (run_dir / "checkpoints" / "latest").write_text("step_00000100\n")
    pretrain.signal_step(signal.SIGUSR1)
    (pretrain.record / "requeued").unlink()
    (pretrain.record / STARTED).unlink()
    status, output = pretrain.signal_step(signal.SIGUSR1)
    assert status == 1
    assert "queued again 3 times without progress (it is at: step_00000100)" in output
    assert not (pretrain.record / "requeued").exists()


def test_cancelling_a_job_that_was_warned_ends_it(pretrain: Job) -> None:
    """A `scancel` in the minutes before the time limit is no requeue."""
    process = pretrain.start(STEP_TICKS="400", STATUS_ON_USR1="75")
    deadline_s = time.monotonic() + 60
    while not (pretrain.record / STARTED).exists():
        assert time.monotonic() < deadline_s, "the step did not start"
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 75, output
    assert not (pretrain.record / "requeued").exists()


def test_a_warning_that_is_due_before_the_start_is_refused(pretrain: Job) -> None:
    """--signal of 300 s and a time limit of 5 minutes: the job would be warned at each start."""
    status, output = pretrain.signal_step(signal.SIGUSR1, FAKE_LIMIT="00:05:00")
    assert status == 2
    assert "the time limit of 300 s is not above the 300 s of --signal" in output
    assert not (pretrain.record / "requeued").exists()


def test_the_error_of_any_rank_is_the_last_line(pretrain: Job) -> None:
    """It stands in the run's verdict; that of an earlier start is not taken for it."""
    run_dir = pretrain.record / "run"
    run_dir.mkdir()
    content = {"start": "1234567.0", "outcome": "failed", "message": 'rank 3: there is no "x"'}
    text = json.dumps(content, indent=1)
    (run_dir / "verdict.json").write_text(text)
    status, output = pretrain.run(STEP_STATUS="1")
    assert status == 1
    assert output.splitlines()[-1] == 'error: rank 3: there is no "x"'
    (run_dir / "verdict.json").write_text(text.replace("1234567.0", "1234567.1"))
    status, output = pretrain.run(STEP_STATUS="1")
    assert output.splitlines()[-1].startswith("error: the step ended with status 1")


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({}, ["done", ""]),
        ({"CHECK_STATUS": "2"}, ["refused", "train.steps must be a number"]),
        (
            {"STEP_STATUS": "9"},
            ["failed", "the step ended with status 9; its own lines above say why"],
        ),
        ({"STEP_STATUS": "75"}, ["stopped", "stopped on request"]),
    ],
)
def test_the_job_tells_how_it_ended(
    tmp_path: Path, environment: dict[str, str], told: list[str]
) -> None:
    """`run.notify` is the script's to call, once; the ranks are told that it does."""
    job = Job(tmp_path, "pretrain_7b.sh")
    _, output = job.run(**environment)
    assert job.told() == told, output
    if "CHECK_STATUS" in environment:
        assert output.splitlines()[-1] == "error: train.steps must be a number"
    else:
        assert "HEADWAY_NOTIFIED_BY=job" in (job.record / "srun_environment").read_text()


def test_a_job_that_is_queued_again_tells_nothing(tmp_path: Path) -> None:
    """It has not ended."""
    job = Job(tmp_path, "pretrain_7b.sh")
    job.signal_step(signal.SIGUSR1)
    assert (job.record / "requeued").exists()
    assert job.told() == []
