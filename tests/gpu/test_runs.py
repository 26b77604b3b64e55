"""Whole runs on a GPU by the command line: resume, checkpoints between devices, export, text."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint.file_names import WEIGHTS
from pipeline.checkpoint.files import checkpoint_path
from pipeline.checkpoint.sharded_tensors import StateFiles
from pipeline.config.run_config import load_config
from tests.support.training_runs import metrics_without_times

ROOT = Path(__file__).parents[2]
# A model whose attention heads are 64 wide, which all attention kernels take.
MODEL = ("model.hidden_size=128", "model.attention_heads=2", "model.kv_heads=1")


def _run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def _train(config: Path, device: str, run_dir: Path, *settings: str) -> str:
    values = [*MODEL, f"train.device={device}", f"run.dir={run_dir}", *settings]
    return _run("pipeline.train", str(config), "--set", *values)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", [1, 3])
def test_resume_is_exact_to_the_bit(
    device: torch.device, config: Path, tmp_path: Path, zero: int, precision: str
) -> None:
    """With `train.deterministic`, metrics and all weights and moments."""
    settings = [f"parallel.zero={zero}", f"train.precision={precision}"]
    settings += ["train.deterministic=true"]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    _train(config, device.type, straight, *settings)
    _train(config, device.type, resumed, *settings, "train.stop_at_step=5")
    _train(config, device.type, resumed, *settings)
    assert metrics_without_times(resumed) == metrics_without_times(straight)
    model = load_config(config, MODEL).model
    ours, wanted = (StateFiles(checkpoint_path(d) / WEIGHTS, model) for d in (resumed, straight))
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        for name in ("trunk.embedding.weight", "heads.readout.weight"):
            part = {"tensor_rank": 0, "tensor_size": 1, "start": 0, "stop": 260 * 128}
            assert torch.equal(ours.part(kind, name, **part), wanted.part(kind, name, **part))


def test_checkpoints_move_between_devices(
    device: torch.device, config: Path, tmp_path: Path
) -> None:
    """Saved on the GPU, loaded on a CPU, and back: the curve goes on."""
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    _train(config, "cpu", straight, "train.precision=fp32")
    for stop, kind in ((4, device.type), (8, "cpu"), (12, device.type)):
        _train(config, kind, moved, "train.precision=fp32", f"train.stop_at_step={stop}")
    records = zip(metrics_without_times(moved), metrics_without_times(straight), strict=True)
    for record, wanted in records:
        assert record["loss"] == pytest.approx(wanted["loss"], rel=1e-4)


def test_export_and_generation(device: torch.device, config: Path, tmp_path: Path) -> None:
    """The export of a run on the GPU generates there; all heads give what one head gives."""
    _train(config, device.type, tmp_path / "run")
    _run("pipeline.export", str(tmp_path / "run"), str(tmp_path / "export"))
    said = _run(
        *("model.generate", str(tmp_path / "export"), "--prompt", "ab", "--max-new-tokens", "40"),
        *("--compare",),
    )
    assert "outputs are equal" in said
