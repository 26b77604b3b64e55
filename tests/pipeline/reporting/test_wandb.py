"""Weights & Biases: one run there for one run here, however often it is resumed; also offline.

With the real package where it is installed (`pip install wandb`); it needs no network offline.
"""

from pathlib import Path

import pytest

from tests.support.training_runs import start_job

pytest.importorskip("wandb", reason="the package wandb is not installed")


def test_a_resumed_run_goes_on_under_its_id(config: Path, tmp_path: Path) -> None:
    """Two starts leave two offline folders of one id, which the run's folder keeps."""
    for stop in (3, 6):
        settings = [f"train.stop_at_step={stop}", "log.wandb_project=trial", "eval.every_steps=0"]
        job = start_job(
            tmp_path,
            [str(config), "--set", *settings],
            world=2,
            environment={"WANDB_MODE": "offline", "WANDB_SILENT": "true"},
        )
        outcome = job.finish()
        assert outcome.codes == [0, 0], outcome.output
    run = tmp_path / "run"
    kept = (run / "wandb_id").read_text().strip()
    files = sorted((run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert [path.name for path in files] == [f"run-{kept}.wandb"] * 2
    for path in files:
        assert b"loss/head_1" in path.read_bytes()
