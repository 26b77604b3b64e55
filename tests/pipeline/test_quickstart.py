"""The quickstart's own decisions: when it kills, what it kills, what it calls a success."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.config.run_config import RunConfig, load_config
from pipeline.quickstart import (
    Parts,
    QuickstartError,
    check_fall,
    describe_losses,
    held_out_losses,
    kill_part_way,
    kill_tree,
)
from pipeline.reporting.metrics import Scalars

ROOT = Path(__file__).resolve().parent.parent.parent

# Writes a line of metrics every 20 ms, and a checkpoint at step 10, as a training run does.
FAKE_RUN = """
import json, pathlib, sys, time
run_dir, last_step = pathlib.Path(sys.argv[1]), int(sys.argv[2])
(run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
with open(run_dir / "metrics.jsonl", "w") as metrics:
    for step in range(1, last_step + 1):
        print(json.dumps({"step": step}), file=metrics, flush=True)
        if step == 10:
            (run_dir / "checkpoints" / "latest").write_text("step_00000010")
        time.sleep(0.02)
"""


def _config(run_dir: Path) -> RunConfig:
    """The quickstart's configuration with another folder and 100 steps: killed from step 55 on."""
    path = ROOT / "configs" / "quickstart.yaml"
    return load_config(path, [f"run.dir={run_dir}", "train.steps=100"])


def _parts() -> Parts:
    parts = Parts(1, {})
    parts.begin("a part")
    return parts


def _records(early: float, final: float) -> list[Scalars]:
    """Metrics of a run of two heads, with validation at steps 10, 20 and 30."""
    losses = {10: early, 20: (early + final) / 2, 30: final}
    return [
        {"step": step, "loss": 1.0}
        if step not in losses
        else {"step": step, "eval_loss_head_1": losses[step], "eval_loss_head_2": losses[step] + 1}
        for step in range(1, 32)
    ]


def test_kill_reaches_grandchildren_with_sessions_of_their_own() -> None:
    """Ranks under a launcher are in sessions of their own; none survives the kill."""
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', "
    child += "'import time; time.sleep(600)'], start_new_session=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", child])
    deadline_s = time.monotonic() + 30
    while not (children := psutil.Process(process.pid).children(recursive=True)):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    kill_tree(process.pid)
    assert process.wait(timeout=30) == -9
    gone, alive = psutil.wait_procs(children, timeout=30)
    assert (len(gone), alive) == (1, [])


def test_run_is_killed_past_half_of_its_steps_and_after_a_checkpoint(tmp_path: Path) -> None:
    """The step that is reported is the last one the metrics have; the run did not end by itself."""
    command = [sys.executable, "-c", FAKE_RUN, str(tmp_path), "100"]
    step = kill_part_way(_parts(), command, _config(tmp_path))
    written = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert 55 <= step <= len(written) < 100


def test_metrics_of_an_earlier_run_do_not_count(tmp_path: Path) -> None:
    """A second quickstart finds a finished run in the folder and still trains to the middle."""
    (tmp_path / "checkpoints").mkdir()
    for name, text in (("metrics.jsonl", json.dumps({"step": 100})), ("checkpoints/latest", "x")):
        (tmp_path / name).write_text(text + "\n")
        os.utime(tmp_path / name, (1_000_000, 1_000_000))
    command = [sys.executable, "-c", "import time; time.sleep(0.5)\n" + FAKE_RUN, str(tmp_path)]
    step = kill_part_way(_parts(), [*command, "100"], _config(tmp_path))
    assert 55 <= step < 100


def test_run_that_fails_by_itself_is_an_error_with_its_status(tmp_path: Path) -> None:
    """Training that ends before the kill is not passed over in silence."""
    command = [sys.executable, "-c", "raise SystemExit(7)"]
    with pytest.raises(QuickstartError, match="ended with status 7 before it could be killed"):
        kill_part_way(_parts(), command, _config(tmp_path))


def test_failing_command_ends_the_quickstart() -> None:
    """The stage and the status are named."""
    with pytest.raises(QuickstartError, match="a part: the command ended with status 3"):
        _parts().run(sys.executable, "-c", "raise SystemExit(3)")


def test_losses_are_those_of_step_10_and_of_the_end() -> None:
    """Every head is listed; 8 to 5 is a fall of 37.5 %."""
    losses = held_out_losses(_records(8.0, 5.0))
    assert [(loss.head, loss.early, loss.final) for loss in losses] == [(1, 8, 5), (2, 9, 6)]
    assert losses[0].fall == pytest.approx(0.375)
    check_fall(losses)
    assert "-37.5%" in describe_losses(losses, 30).splitlines()[1]


def test_a_small_fall_is_refused() -> None:
    """8 to 5.3 is a fall of 33.75 %, less than the bar of 35 %."""
    with pytest.raises(QuickstartError, match=r"fell by 33\.8%, less than 35%"):
        check_fall(held_out_losses(_records(8.0, 5.3)))


def test_metrics_without_validation_are_refused() -> None:
    """A run without validation cannot show a held-out loss."""
    with pytest.raises(QuickstartError, match=r"eval\.every_steps"):
        held_out_losses([{"step": step} for step in range(1, 31)])
    with pytest.raises(QuickstartError, match=r"eval\.every_steps"):
        held_out_losses(_records(8.0, 5.0)[:15])
