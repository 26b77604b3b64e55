"""Ranks that die or freeze, and gradients that are not finite."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_prep.loading.loader import Batch
from pipeline.distributed.rendezvous import rank_info
from pipeline.distributed.topology import Topology
from pipeline.engine.build import build_engine
from tests.support.engine_cases import TINY_BUCKET, Case, engine_config, local_batches, whole
from tests.support.engine_probes import parameters
from tests.support.harness import run_ranks
from tests.support.long_forms import part_of
from tests.support.training_runs import last_step, run_job, start_job


@pytest.mark.parametrize(
    ("victim", "number"),
    [
        (1, signal.SIGKILL),
        pytest.param(0, signal.SIGKILL, marks=pytest.mark.stress),
    ],
)
def test_dead_rank_ends_the_job(
    config: Path, tmp_path: Path, victim: int, number: signal.Signals
) -> None:
    """The other rank stops well within a minute with an error that names the dead one."""
    job = start_job(tmp_path, [str(config), "--set", "train.steps=5000"], world=2)
    job.wait_until(lambda: last_step(tmp_path / "run") >= 3)
    job.kill(victim, number)
    started = time.monotonic()
    outcome = job.finish()
    assert time.monotonic() - started < 60
    survivor = 1 - victim
    assert outcome.codes[survivor] not in (0, 75)
    # With rank 0 its store is gone too, and all that is known is that.
    assert f"rank {victim}" in outcome.output[survivor], outcome.output[survivor]
    assert "died" in outcome.output[survivor]


def test_frozen_rank_ends_the_job(config: Path, tmp_path: Path) -> None:
    """A rank that stops answering is named after the heartbeat's timeout."""
    settings = ["train.steps=5000", "train.heartbeat_timeout_s=5"]
    job = start_job(tmp_path, [str(config), "--set", *settings], world=2)
    job.wait_until(lambda: last_step(tmp_path / "run") >= 3)
    job.kill(1, signal.SIGSTOP)
    started = time.monotonic()
    while job.is_alive(0):
        assert time.monotonic() - started < 60
        time.sleep(0.1)
    job.kill(1)
    outcome = job.finish()
    assert outcome.codes[0] == 1
    assert "rank 1/2" in outcome.output[0]
    assert "has not answered" in outcome.output[0]


def test_loss_that_stays_infinite_ends_the_run(config: Path, tmp_path: Path) -> None:
    """Steps whose gradients are not finite are skipped, logged and counted; then the run stops."""
    settings = ["optimizer.learning_rate=1.0e30", "train.max_skipped_steps=2"]
    outcome = run_job(tmp_path, [str(config), "--set", *settings], world=2)
    assert outcome.codes == [2, 2]
    assert outcome.output[0].count("skipped: loss or gradients are not finite") == 3
    assert "3 steps in a row were skipped" in outcome.errors[0]
    assert "train.max_skipped_steps=2" in outcome.errors[0]
    assert "lower optimizer.learning_rate" in outcome.errors[0]


def _weights_after(case: Case, steps: list[tuple[int, bool]]) -> tuple[list[bool], list[Tensor]]:
    """Which steps were taken, and the whole weights after them; true = the step is poisoned."""
    topology = Topology(rank_info(os.environ), case.tensor, torch.device("cpu"))
    engine = build_engine(engine_config(case), topology, "fp32")
    run, poisoned = engine.execution.run, False

    def run_poisoned(
        batches: list[Batch], scales: Tensor, sequence_losses: Tensor | None = None
    ) -> Tensor:
        return run(batches, scales * float("nan") if poisoned else scales, sequence_losses)

    engine.execution.run = run_poisoned  # type: ignore[method-assign]
    applied = []
    for step, poison in steps:
        poisoned = poison and topology.info.rank == 1
        batches = local_batches(step, case, topology.data_rank)
        applied.append(engine.train_step(batches, learning_rate=1e-3).applied)
    weights = [whole(name, weight.clone(), topology) for name, weight in parameters(engine)]
    return applied, weights


@pytest.mark.parametrize(
    "case",
    part_of(
        [
            Case(world=2, zero=zero, bucket=TINY_BUCKET, accumulation=accumulation)
            for zero in (0, 1, 2, 3)
            for accumulation in (1, 2)
        ],
        # Each level once in `make test`, half of them with several micro-batches.
        lambda number, _: number in (0, 3, 4, 7),
    ),
    ids=lambda case: f"{case.zero}-{case.accumulation}",
)
def test_poisoned_step_leaves_no_trace(case: Case) -> None:
    """A NaN on one rank: all ranks skip, and the weights are as if that step had not been."""
    results = run_ranks(2, _weights_after, case, [(0, False), (1, True), (2, False)])
    expected = run_ranks(2, _weights_after, case, [(0, False), (2, False)])[0][1]
    for applied, weights in results:
        assert applied == [True, False, True]
        for weight, other in zip(weights, expected, strict=True):
            assert torch.equal(weight, other)
