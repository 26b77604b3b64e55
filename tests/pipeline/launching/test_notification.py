"""`run.notify`: called once when a run ends, with what happened; it changes nothing."""

import logging
import os
import time
from pathlib import Path

import pytest

from pipeline.config.sections import RunSection
from pipeline.launching import notification
from pipeline.launching.notification import BY_LAUNCHER, Ending, notify, variables
from pipeline.train import main
from tests.support.training_runs import Outcome, last_step, run_job, start_job

KEYS = ("STATUS", "RUN", "STEP", "RUN_DIR", "REASON")


def _command(folder: Path, then: str = "") -> str:
    """A command that writes its variables down, a line per call, and then something else."""
    words = "|".join(f"$HEADWAY_{key}" for key in KEYS)
    return f'echo "{words}" >> {folder}/told; {then}'


def _told(folder: Path) -> list[dict[str, str]]:
    path = folder / "told"
    lines = path.read_text().splitlines() if path.exists() else []
    return [dict(zip(KEYS, line.split("|"), strict=True)) for line in lines]


def _trained(config: Path, folder: Path, *settings: str, then: str = "") -> Outcome:
    command = f"run.notify={_command(folder, then)!r}"
    return run_job(folder, [str(config), "--set", command, *settings], world=2)


def test_the_end_is_told_once(config: Path, tmp_path: Path) -> None:
    """By one of two ranks; a command that fails is a warning, and the run has succeeded."""
    outcome = _trained(config, tmp_path, then="echo no such mailbox; exit 3")
    assert outcome.codes == [0, 0], outcome.output
    assert _told(tmp_path) == [
        {
            "STATUS": "done",
            "RUN": "tiny",
            "STEP": "12",
            "RUN_DIR": str(tmp_path / "run"),
            "REASON": "done at step 12 of 12",
        }
    ]
    log = (tmp_path / "run" / "logs" / "rank_00000.log").read_text()
    assert "WARNING run.notify ended with status 3: no such mailbox" in log


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("batch.micro_size=100000", "fewer than one global batch"),  # found by all ranks
        ("train.device=cuda", "train.device=cuda"),  # before the ranks meet
    ],
)
def test_a_refusal_is_told_once(config: Path, tmp_path: Path, setting: str, reason: str) -> None:
    """With the reason that the user reads, and the exit code of a refusal."""
    assert _trained(config, tmp_path, setting).codes == [2, 2]
    (told,) = _told(tmp_path)
    assert (told["STATUS"], told["STEP"]) in (("refused", ""), ("refused", "0"))
    assert reason in told["REASON"]


def test_a_lost_rank_is_told_by_another(config: Path, tmp_path: Path) -> None:
    """Which says who was lost."""
    settings = [f"run.notify={_command(tmp_path)!r}", "train.steps=100000"]
    job = start_job(tmp_path, [str(config), "--set", *settings], world=2)
    job.wait_until(lambda: last_step(tmp_path / "run") > 2)
    job.kill(1)
    job.finish()
    (told,) = _told(tmp_path)
    assert told["STATUS"] == "lost"
    assert "rank 1/2" in told["REASON"]
    assert int(told["STEP"]) > 2


def test_a_command_that_hangs_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After its time limit, with all that it has started."""
    monkeypatch.setattr(notification, "TIME_LIMIT_S", 1)
    run = RunSection(name="a", notify=f"sleep 47 & echo $! > {tmp_path}/pid; wait")
    started = time.monotonic()
    notify(run, Ending("failed", "a bug", 3))
    assert time.monotonic() - started < 10
    assert "run.notify ended with status 124 after 1 s, its time limit" in caplog.text
    child = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}")
    deadline = time.monotonic() + 10
    while child.exists() and "sleep" in (child / "cmdline").read_text():
        assert time.monotonic() < deadline, "the command's child still sleeps"
        time.sleep(0.05)


def test_a_launcher_tells_it_itself(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks of the job script say nothing; its own call does, with the step of the metrics."""
    settings = ["--set", f"run.notify={_command(tmp_path)!r}"]
    monkeypatch.setenv(BY_LAUNCHER, "job")
    arguments = [str(config), *settings, "train.stop_at_step=3"]
    outcome = start_job(
        tmp_path, arguments, world=1, environment={BY_LAUNCHER: os.environ[BY_LAUNCHER]}
    ).finish()
    assert outcome.codes == [0]
    assert _told(tmp_path) == []
    assert main([str(config), *settings, "--notify", "lost", "node3 is gone"]) == 0
    (told,) = _told(tmp_path)
    assert (told["STATUS"], told["STEP"], told["REASON"]) == ("lost", "3", "node3 is gone")


def test_an_unknown_outcome_is_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever writes a wrapper sees the words there are."""
    assert main([str(config), "--notify", "finished", "well"]) == 2
    assert "--notify finished must begin with one of done, stopped" in capsys.readouterr().err


def test_any_reason_fits_into_a_variable() -> None:
    """Whatever an exception's text holds: long, of several lines, no text at all."""
    reason = "a\nbug \0 of \udcff" + "x" * 1_000_000
    told = variables(RunSection(name="a"), Ending("failed", reason, None))["HEADWAY_REASON"]
    assert told.startswith("a bug \\x00 of \\udcff")
    assert len(told.encode()) < 20_000


def test_no_command_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    """The key is empty unless somebody sets it."""
    with caplog.at_level(logging.DEBUG):
        notify(RunSection(name="a"), Ending("done", "done", 1))
    assert caplog.text == ""
