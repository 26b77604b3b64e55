"""Runs with data.review through the real command, and what is to be compared of them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.loading.loader import IGNORED, TokenLoader
from pipeline.checkpoint.file_names import WEIGHTS
from pipeline.checkpoint.files import checkpoint_path
from pipeline.checkpoint.folder import read_config
from pipeline.checkpoint.sharded_tensors import read_weights
from tests.support.tiny_model import head_logits, tiny_model
from tests.support.training_runs import metrics_without_times, run_job

PHASES = (
    "data.review={phases: [{name: learn}, {name: focus, drop_percent: 50, repetitions: 2}, "
    "{name: review, epochs: 1}, {name: focus, drop_percent: 70}]}"
)
LENGTH = 240
# 16 samples a step in every layout.
SETTINGS = ["train.steps=null", PHASES, "checkpoint.every_steps=0"]
SETTINGS += ["eval.every_steps=0", "parallel.zero=0", f"data.sequence_length={LENGTH}"]
ONE = ["batch.micro_size=16"]
SAVING = ["checkpoint.every_steps=1", "checkpoint.keep=100"]
TWO = ["batch.micro_size=4", "batch.accumulation=2"]
STAGES = "parallel.stages=[{trunk: 0-1}, {heads: 1-3}]"
LAYOUTS = {
    "dp2": (2, [*TWO, "parallel.zero=3"]),
    "dp2_zero1": (2, [*TWO, "parallel.zero=1"]),
    "dp2_zero2": (2, [*TWO, "parallel.zero=2"]),
    "tp2": (2, ["batch.micro_size=8", "batch.accumulation=2", "parallel.tensor=2"]),
    "stages2": (2, ["batch.micro_size=4", "batch.accumulation=4", STAGES]),
    "dp8": (8, ["batch.micro_size=1", "batch.accumulation=2", "parallel.zero=1"]),
}


def reviewed_run(
    config: Path, folder: Path, *settings: str, world: int = 1, resume: Path | None = None
) -> Path:
    """Run to the end, or to where the settings say, from a checkpoint if given; its folder."""
    run_dir = folder / "run"
    folder.mkdir(exist_ok=True)
    arguments = [str(config), "--set", *SETTINGS, f"run.dir={run_dir}", *settings]
    arguments += [] if resume is None else ["--resume", str(resume)]
    outcome = run_job(folder, arguments, world=world)
    assert outcome.codes == [0] * world, outcome.output
    return run_dir


def review_arrays(folder: Path) -> dict[str, NDArray[Any]]:
    """All arrays of a folder, by the names of their files."""
    return {path.name: np.load(path) for path in sorted(folder.glob("*.npy"))}


def saved_at(run_dir: Path, step: int) -> Path:
    """The checkpoint of a step, of a run with `SAVING`."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def last_step_of(run_dir: Path, phase: int) -> int:
    """The step after which another phase begins."""
    records = metrics_without_times(run_dir)
    return int(max(r["step"] for r in records if r["review_phase"] == phase))


def forward_losses(
    checkpoint: Path, loader: TokenLoader, first_sample: int, count: int
) -> NDArray[np.float32]:
    """Mean loss of head 1 over each of some sequences, by a forward apart from training.

    Args:
        checkpoint: whose weights.
        loader: of the sequences.
        first_sample: the first of them.
        count: how many.
    """
    checkpoint = checkpoint_path(checkpoint)
    config = read_config(checkpoint)
    model = tiny_model(
        config.model, dict(read_weights(checkpoint / WEIGHTS, config.model)), torch.float32
    )
    batch = loader.read(first_sample, count)
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(
            head_logits(model, batch.tokens)[0].transpose(1, 2),
            batch.labels[0],
            ignore_index=IGNORED,
            reduction="none",
        )
    found: NDArray[np.float32] = losses.mean(1).numpy()
    return found
