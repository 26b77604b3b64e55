"""Runs with pipeline stages from the command line: figures, files and faults as without them."""

import json
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_prep.loading.loader import Batch
from pipeline.checkpoint.file_names import FOLDER, WEIGHTS, committed
from pipeline.checkpoint.files import checkpoint_path
from pipeline.checkpoint.folder import read_config
from pipeline.checkpoint.sharded_tensors import read_weights
from pipeline.checkpoint.train_state import read_state
from pipeline.engine.build import build_engine
from pipeline.engine.pipeline_stage import PipelineStage
from pipeline.export import export
from tests.support.engine_cases import Case, build_topology, engine_config, local_batches
from tests.support.engine_probes import parameters
from tests.support.harness import run_ranks
from tests.support.long_forms import part_of
from tests.support.training_runs import last_step, metrics_without_times, run_job, start_job

# fp32 sums in another order.
TOLERANCE = 1e-5
# The tiny run has a trunk of 2 layers and 3 heads; settings and ranks of each layout.
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, ["parallel.zero=0"]),
    "auto2-zero1": (2, ["parallel.zero=1", "parallel.stages=auto:2", "batch.accumulation=4"]),
    "three-dp2-zero3": (
        6,
        [
            "parallel.stages=[trunk: 0-1, heads: 1, heads: 2-3]",
            "batch.accumulation=2",
        ],
    ),
    "four-tp2-zero2": (
        8,
        [
            "parallel.zero=2",
            "parallel.tensor=2",
            "parallel.stages=[trunk: 0, trunk: 1, heads: 1-2, heads: 3]",
            "batch.accumulation=2",
        ],
    ),
}
GLOBAL_BATCH = 4


def _micro_size(name: str) -> str:
    """The setting that gives every layout the same global batch."""
    settings = LAYOUTS[name][1]
    accumulation = next((int(s[-1]) for s in settings if "accumulation" in s), 1)
    data = 2 if "dp2" in name else 1
    return f"batch.micro_size={GLOBAL_BATCH // (accumulation * data)}"


def _train(config: Path, tmp_path: Path, name: str, *more: str) -> Path:
    """Run a layout to its end; its folder."""
    world, settings = LAYOUTS[name]
    run_dir = tmp_path / name
    arguments = [str(config), "--set", f"run.dir={run_dir}", _micro_size(name), *settings, *more]
    outcome = run_job(tmp_path, arguments, world=world)
    assert set(outcome.codes) == {0}, outcome.output
    return run_dir


def _figures(run_dir: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in record.items() if key != "stage_idle_fraction"}
        for record in metrics_without_times(run_dir)
    ]


@pytest.mark.parametrize("name", part_of(list(LAYOUTS)[1:], lambda _, name: name == "auto2-zero1"))
def test_staged_runs_write_the_metrics_of_one_stage(
    config: Path, tmp_path: Path, name: str
) -> None:
    """Losses of all heads, norms and validation agree line by line; checkpoints, weight by weight.

    Staged runs add how long each stage waited.
    """
    expected_dir = _train(config, tmp_path, "one")
    expected = _figures(expected_dir)
    assert len(expected) == 12
    weights = dict(_weights(expected_dir))
    run_dir = _train(config, tmp_path, name)
    for record, wanted in zip(_figures(run_dir), expected, strict=True):
        assert record.keys() == wanted.keys()
        for key, value in wanted.items():
            tolerance = 5e-3 if key == "eval_tokens_per_forward" else TOLERANCE
            assert record[key] == pytest.approx(value, rel=tolerance), (name, key)
    for parameter, weight in _weights(run_dir):
        difference = (weight - weights[parameter]).norm() / weights[parameter].norm()
        assert difference < TOLERANCE, (name, parameter)
    stages = read_state(checkpoint_path(run_dir)).layout.stages
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    for line in lines:
        idle = json.loads(line)["stage_idle_fraction"]
        assert len(idle) == stages
        assert all(0 <= share < 1 for share in idle)


def _weights(run_dir: Path) -> Iterator[tuple[str, Tensor]]:
    checkpoint = checkpoint_path(run_dir)
    return read_weights(checkpoint / WEIGHTS, read_config(checkpoint).model)


@pytest.mark.parametrize("name", part_of(list(LAYOUTS)[1:], lambda _, name: name == "auto2-zero1"))
def test_a_staged_run_that_was_killed_goes_on_bit_identically(
    config: Path, tmp_path: Path, name: str
) -> None:
    """SIGKILL of all ranks between two checkpoints: metrics and weights as without it."""
    straight = _train(config, tmp_path, name)
    world, settings = LAYOUTS[name]
    killed = tmp_path / "killed"
    arguments = [str(config), "--set", f"run.dir={killed}", _micro_size(name), *settings]
    job = start_job(tmp_path, arguments, world=world)
    job.wait_until(lambda: last_step(killed) >= 5 and bool(committed(killed / FOLDER)))
    for rank in range(world):
        job.kill(rank)
    assert all(code != 0 for code in job.finish().codes)
    outcome = run_job(tmp_path, arguments, world=world)
    assert set(outcome.codes) == {0}, outcome.output
    assert "resumed from" in outcome.output[0]
    assert _figures(killed) == _figures(straight)
    expected = dict(_weights(straight))
    for parameter, weight in _weights(killed):
        assert torch.equal(weight, expected[parameter]), parameter


def test_a_staged_run_exports(config: Path, tmp_path: Path) -> None:
    """The exported model has every head, and its logits are those of the checkpoint."""
    run_dir = _train(config, tmp_path, "auto2-zero1")
    said: list[str] = []
    export(run_dir, tmp_path / "export", report=said.append)  # raises where logits differ
    assert "3 heads" in said[0]


def test_dry_run_draws_the_grid(config: Path, tmp_path: Path) -> None:
    """Ranks by stage, and each stage's parameters, weight and predicted waiting."""
    plan = "parallel.stages=[trunk: 0, trunk: 1, heads: 1-3]"
    settings = ["--set", plan, "parallel.tensor=2", "batch.accumulation=8"]
    outcome = run_job(tmp_path, [str(config), *settings, "--dry-run", "--world-size", "12"])
    assert outcome.codes == [0], outcome.output
    text = outcome.output[0]
    assert "12 ranks = 2 data x 2 tensor x 3 stages" in text
    for line in ("stage 0     [0 1] [2 3]", "stage 2     [8 9] [10 11]"):
        assert line in text
    assert text.count("layer-equivalents, predicted idle") == 3


def test_a_world_that_stages_do_not_divide_is_refused(config: Path, tmp_path: Path) -> None:
    """The message names both factors and worlds that would do."""
    settings = ["--set", "parallel.stages=auto:2"]
    outcome = run_job(tmp_path, [str(config), *settings], world=3)
    assert outcome.codes[0] == 2
    assert "2 stages (parallel.stages) x parallel.tensor=1" in outcome.errors[0]
    assert "start 2 or 4 ranks" in outcome.errors[0]


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.stress)]
)
def test_a_dead_or_frozen_rank_of_any_stage_ends_the_job(
    config: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """All others stop within a minute, naming the rank, its stage and what they waited for."""
    plan = "parallel.stages=[trunk: 0, trunk: 1, heads: 1-3]"
    settings = [plan, "parallel.zero=1", "batch.accumulation=4", "batch.micro_size=1"]
    arguments = [str(config), "--set", "train.steps=5000", *settings]
    job = start_job(tmp_path, arguments, world=3)
    job.wait_until(lambda: last_step(tmp_path / "run") >= 3)
    job.kill(2, number)
    started = time.monotonic()
    while job.is_alive(0) or job.is_alive(1):
        assert time.monotonic() - started < 60
        time.sleep(0.1)
    if number == signal.SIGSTOP:
        job.kill(2)
    outcome = job.finish()
    for rank in (0, 1):
        assert outcome.codes[rank] not in (0, 75)
        assert "rank 2/3 (stage 2, tp 0, dp 0)" in outcome.output[rank], outcome.output[rank]
    said = "".join(outcome.output[:2])
    assert said.count("this rank was waiting for the ") >= 2, said


def _poisoned(case: Case, steps: list[tuple[int, bool]]) -> tuple[list[bool], list[Any]]:
    """Which steps were taken, and the weights after them; true = a NaN in the last stage."""
    topology = build_topology(case)
    engine = build_engine(engine_config(case), topology, "fp32")
    assert isinstance(engine.execution, PipelineStage)
    runner = engine.execution.runner
    run = runner.run
    poisoned = False

    def run_poisoned(
        batches: Sequence[Batch], scales: Tensor, sequence_losses: Tensor | None = None
    ) -> Tensor:
        return run(batches, scales * float("nan") if poisoned else scales, sequence_losses)

    runner.run = run_poisoned  # type: ignore[method-assign]
    applied = []
    for step, poison in steps:
        poisoned = poison and topology.info.rank == case.world - 1
        batches = local_batches(step, case, topology.data_rank)
        applied.append(engine.train_step(batches, learning_rate=1e-3).applied)
    return applied, [weight.clone() for _, weight in parameters(engine)]


@pytest.mark.parametrize(
    "zero", [1, 3, *(pytest.param(zero, marks=pytest.mark.stress) for zero in (0, 2))]
)
def test_a_poisoned_step_leaves_no_trace_in_any_stage(zero: int) -> None:
    """A NaN in one rank's heads: all stages skip the step, and the next one is as without it."""
    case = Case(world=3, zero=zero, accumulation=2, stages="trunk 0-2|heads 1-2|heads 3")
    results = run_ranks(3, _poisoned, case, [(0, False), (1, True), (2, False)])
    expected = run_ranks(3, _poisoned, case, [(0, False), (2, False)])
    for (applied, weights), (_, wanted) in zip(results, expected, strict=True):
        assert applied == [True, False, True]
        for weight, other in zip(weights, wanted, strict=True):
            assert torch.equal(weight, other)
