"""One job writes into a run's folder at a time; who is gone for sure holds nothing up."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from model.errors import ConfigError
from pipeline.distributed import lease as lease_module
from pipeline.distributed.lease import LEASE_NAME, Lease
from pipeline.distributed.processes import process_space
from tests.support.hostile import limits
from tests.support.training_runs import last_step, run_job, start_job

ELSEWHERE = {"host": "node7", "processes": "another machine/pid:[1]", "pid": 4242}
LONG = ["train.steps=2000", "checkpoint.every_steps=2", "eval.every_steps=0"]


def _lease(run_dir: Path, *, expiry_s: float = 60.0, **environment: str) -> Lease:
    return Lease(run_dir, environment, lost=lambda reason: None, expiry_s=expiry_s)


def _held_elsewhere(run_dir: Path, **changes: Any) -> Path:
    """A lease file as a job on another machine writes it."""
    content = {"token": "t", "slurm_job": None, "slurm_restarts": 0, "count": "1", **ELSEWHERE}
    path = run_dir / LEASE_NAME
    path.write_text(json.dumps(content | changes))
    return path


def test_a_second_job_is_refused_at_once(tmp_path: Path) -> None:
    """The refusal names host, process and Slurm job, and what to do; afterwards it is free."""
    first = _lease(tmp_path, SLURM_JOB_ID="77")
    first.acquire()
    with pytest.raises(ConfigError) as caught:
        _lease(tmp_path).acquire()
    for words in (f"process {os.getpid()} on ", "Slurm job 77", "scancel 77", "run.dir="):
        assert words in str(caught.value)
    first.release()
    assert list(tmp_path.iterdir()) == []
    second = _lease(tmp_path)
    second.acquire()
    second.release()


def test_a_folder_that_other_ranks_do_not_see_is_refused(tmp_path: Path) -> None:
    """Before the first step, and with the way out; not by saves that fail at the end."""
    lease = _lease(tmp_path)
    lease.acquire()
    lease.check_shared(within_s=0)
    elsewhere = _held_elsewhere(tmp_path)  # what a rank finds in a folder of its own node
    with pytest.raises(ConfigError, match=r"set run\.dir to a folder that all nodes share"):
        lease.check_shared(within_s=0.5)
    elsewhere.unlink()
    lease.release()


def test_a_dead_process_of_this_machine_holds_nothing(tmp_path: Path) -> None:
    """A process that is gone, or whose number is another's by now, is taken over at once."""
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from pipeline.distributed.lease import Lease\n"
        "assert Lease(Path(sys.argv[1]), {}, lost=print).try_acquire()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    assert done.returncode == -9
    path = tmp_path / LEASE_NAME
    assert path.exists()
    for changes in ({}, {"pid": os.getpid()}):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        found = _lease(tmp_path)
        assert found.try_acquire()
        found.release()
        _held_elsewhere(tmp_path, processes=process_space(), process_start="1")
    assert sorted(path.name for path in tmp_path.iterdir()) == [LEASE_NAME]


def test_another_machine_is_believed_by_its_count(tmp_path: Path) -> None:
    """A count that changes refuses, one that stands still for long enough is taken over."""
    path = _held_elsewhere(tmp_path)
    waiting = _lease(tmp_path, expiry_s=0.2)
    assert not waiting.try_acquire()
    path.write_text(path.read_text().replace('"1"', '"2"'))
    with pytest.raises(ConfigError, match="process 4242 on node7"):
        waiting.try_acquire()
    waiting = _lease(tmp_path, expiry_s=0.2)
    assert not waiting.try_acquire()
    time.sleep(0.3)
    assert waiting.try_acquire()
    assert json.loads(path.read_text())["pid"] == os.getpid()
    waiting.release()


def test_a_lease_that_was_never_written_expires(tmp_path: Path) -> None:
    """A job that was killed between creating and writing the file does not block the folder."""
    (tmp_path / LEASE_NAME).touch()
    waiting = _lease(tmp_path, expiry_s=0.2)
    assert not waiting.try_acquire()
    time.sleep(0.3)
    assert waiting.try_acquire()
    waiting.release()


def test_a_requeued_job_takes_its_own_lease_over(tmp_path: Path) -> None:
    """The same Slurm job, started again, need not wait; the same start of it must."""
    path = _held_elsewhere(tmp_path, slurm_job="77", slurm_restarts=1)
    for restarts in ("1", "0"):
        other = _lease(tmp_path, SLURM_JOB_ID="77", SLURM_RESTART_COUNT=restarts)
        assert not other.try_acquire()
    assert not _lease(tmp_path, SLURM_JOB_ID="78", SLURM_RESTART_COUNT="2").try_acquire()
    again = _lease(tmp_path, SLURM_JOB_ID="77", SLURM_RESTART_COUNT="2")
    assert again.try_acquire()
    assert json.loads(path.read_text())["slurm_restarts"] == 2
    again.release()


def test_the_slower_of_two_that_take_over_gives_the_lease_back(tmp_path: Path) -> None:
    """Both saw the dead holder; the second finds the first one's new lease and leaves it."""
    path = _held_elsewhere(tmp_path)
    slow, quick = _lease(tmp_path), _lease(tmp_path)
    dead = json.loads(path.read_text())
    path.unlink()
    assert quick.try_acquire()
    slow._remove(dead)
    assert json.loads(path.read_text())["pid"] == os.getpid()
    with pytest.raises(ConfigError, match="is in use"):
        slow.try_acquire()
    quick.release()
    assert list(tmp_path.iterdir()) == []


def test_a_job_whose_lease_was_taken_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A holder that was frozen for too long ends when it wakes, and does not touch the new lease.

    One that was merely deleted is made again.
    """
    monkeypatch.setattr(lease_module, "BEAT_S", 0.05)
    reasons: list[str] = []
    held = Lease(tmp_path, {}, lost=reasons.append)
    held.acquire()
    path = tmp_path / LEASE_NAME
    path.unlink()
    deadline = time.monotonic() + 30
    while (made := lease_module._read(path)) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert made is not None
    assert made["pid"] == os.getpid()
    path.unlink()
    _held_elsewhere(tmp_path)
    while not reasons and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "was taken over by process 4242 on node7" in reasons[0]
    held.release()
    assert json.loads(path.read_text())["pid"] == 4242


@pytest.mark.parametrize("resume", ["auto", "none"])
def test_a_run_beside_a_live_one_changes_nothing(config: Path, tmp_path: Path, resume: str) -> None:
    """The second job of two ranks is refused before it moves a file; the first one goes on.

    Killed, the first one leaves a lease that the next start takes over.
    """
    run_dir = tmp_path / "run"
    first = start_job(tmp_path, [str(config), "--set", *LONG], world=2)
    first.wait_until(lambda: last_step(run_dir) >= 3)
    arguments = [str(config), "--resume", resume, "--set", *LONG]
    outcome = run_job(tmp_path, arguments, world=2)
    assert outcome.codes == [2, 2]
    assert len(outcome.errors) == 1
    assert "is in use by process" in outcome.errors[0]
    assert not (run_dir / "previous_1").exists()
    step = last_step(run_dir)
    first.wait_until(lambda: last_step(run_dir) > step)
    for rank in range(2):
        first.kill(rank)
    first.finish()
    assert (run_dir / LEASE_NAME).exists()
    stop = last_step(run_dir) + 1
    arguments += [f"train.stop_at_step={stop}"]
    assert run_job(tmp_path, arguments, world=2).codes == [0, 0]
    assert not (run_dir / LEASE_NAME).exists()


@pytest.mark.parametrize("kind", ["pipe", "device", "deep", "\x1b[2J", "9" * 5000])
def test_a_lease_of_any_content_is_no_lease(tmp_path: Path, kind: str) -> None:
    """It expires like one that was never written, or cannot be used; nothing of it is shown."""
    path = _held_elsewhere(tmp_path, host=kind, slurm_restarts=kind)
    if kind in ("pipe", "device"):
        path.unlink()
        os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    elif kind == "deep":
        path.write_text("[" * 100_000)
    lease = _lease(tmp_path, expiry_s=0)
    with limits(5):
        if kind in ("pipe", "device"):
            with pytest.raises(ConfigError, match="it is not a regular file"):
                lease.try_acquire()
        else:
            assert not lease.try_acquire()
            assert lease.try_acquire()
            lease.release()
