"""Runs that end at a named point of a save, for tests: what is left, and how they go on."""

import contextlib
import random
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pipeline.checkpoint.crash_points import VARIABLE
from pipeline.checkpoint.file_names import FOLDER, WEIGHTS, committed
from pipeline.checkpoint.files import checkpoint_path, verify
from pipeline.checkpoint.folder import read_config
from pipeline.checkpoint.sharded_tensors import read_weights
from tests.support.training_runs import (
    Outcome,
    RunningJob,
    last_step,
    metrics_without_times,
    run_job,
    start_job,
)

KILLED = -9


def crash(
    folder: Path, arguments: Sequence[str], where: str, *, world: int, all_ranks: bool
) -> Outcome:
    """Run until a rank kills itself at a point; with `all_ranks` the others are killed then, too.

    Args:
        folder: for the ranks' output.
        arguments: of the command line.
        where: the point, as `pipeline.checkpoint.crash_points` takes it.
        world: number of ranks.
        all_ranks: whether all end at once, as in a power cut.
    """
    job = start_job(folder, arguments, world=world, environment={VARIABLE: where})
    if all_ranks:
        job.wait_until(lambda: not all(job.is_alive(rank) for rank in range(world)))
        _kill(job, range(world))
    outcome = job.finish()
    assert KILLED in outcome.codes, f"{where} was not reached:\n{outcome.output}"
    assert 0 not in outcome.codes, outcome.output
    return outcome


def kill_at_random(
    folder: Path,
    arguments: Sequence[str],
    run_dir: Path,
    moments: random.Random,
    *,
    world: int,
    last: int,
) -> None:
    """Kill all ranks, one after the other, at some moment after some step before the last."""
    step = min(last_step(run_dir) + moments.randint(1, 4), last - 1)
    job = start_job(folder, arguments, world=world)
    job.wait_until(lambda: last_step(run_dir) >= step)
    time.sleep(moments.uniform(0, 0.3))
    _kill(job, moments.sample(range(world), world))
    job.finish()


def _kill(job: RunningJob, ranks: Iterable[int]) -> None:
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):  # it was quicker
            job.kill(rank)


def go_on(folder: Path, arguments: Sequence[str], *, world: int) -> Outcome:
    """Start again and run to the end."""
    outcome = run_job(folder, arguments, world=world)
    assert outcome.codes == [0] * world, outcome.output
    return outcome


def weights(run_dir: Path) -> dict[str, Tensor]:
    """All weights of the newest checkpoint."""
    checkpoint = checkpoint_path(run_dir)
    return dict(read_weights(checkpoint / WEIGHTS, read_config(checkpoint).model))


def assert_whole(run_dir: Path) -> None:
    """Every folder that has a checkpoint's name is one."""
    for checkpoint in committed(run_dir / FOLDER):
        assert verify(checkpoint) == [], checkpoint


def assert_same_run(straight: Path, other: Path) -> None:
    """Metrics and weights are equal, to the bit."""
    assert metrics_without_times(other) == metrics_without_times(straight)
    expected, found = weights(straight), weights(other)
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert torch.equal(weight, expected[name]), name
