"""Checkpoints for tests, committed as a run commits them but without one."""

from pathlib import Path

import torch

from foundation.durable_files import write_synced
from pipeline.checkpoint.file_names import RESOLVED_CONFIG_NAME, STATE_NAME, TOKENIZER, WEIGHTS
from pipeline.checkpoint.folder import CheckpointFolder
from pipeline.checkpoint.sharded_tensors import Snapshot, run_key
from pipeline.checkpoint.train_state import Layout, TrainState
from pipeline.config.sections import CheckpointSection

LAYOUT = Layout(world_size=2, data=2, tensor=1, stages=1, zero=3, precision="fp32")


def commit(
    run_dir: Path, step: int, options: CheckpointSection, eval_loss: float | None = None
) -> Path:
    """Commit a checkpoint of two ranks and delete what is too much then."""
    folder = CheckpointFolder(run_dir, options)
    partial = folder.prepare(step)
    state = TrainState(
        step=step,
        tokens=step * 1000,
        next_sample=step * 10,
        data_fingerprint="abc",
        data_seed=3,
        sequence_length=100,
        layout=LAYOUT,
        eval_loss=eval_loss,
    )
    entries = {}
    for rank in range(2):
        runs = {run_key("weight", "x", rank * 50): torch.full((50,), float(step))}
        snapshot = Snapshot(rank, 0, 1, step, runs)
        entries[f"{WEIGHTS}/{snapshot.file_name}"] = snapshot.write(partial / WEIGHTS)
    for name, text in (
        (STATE_NAME, state.to_json()),
        (RESOLVED_CONFIG_NAME, "run: {name: tiny}\n"),
        (TOKENIZER, "{}"),
    ):
        entries[name] = write_synced(partial / name, text.encode())
    committed = folder.commit(step, entries)
    folder.finish_deletions()
    return committed
