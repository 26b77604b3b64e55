"""Checks that train: gradients of the run's layout against one process, and steps at full width."""

import contextlib
import io
import math
import os
import subprocess
import sys
import time
from typing import Any, NamedTuple

import torch

from foundation.durable_files import write_synced
from model.structure.parameter_shapes import parameter_shapes
from pipeline.checkpoint.sharded_tensors import StateFiles
from pipeline.config.run_config import RunConfig, to_yaml
from pipeline.diagnosis.check import Check, Context, Outcome
from pipeline.diagnosis.trial import Width, one_process_config, trial_batches, trial_config
from pipeline.distributed.agreement import from_all
from pipeline.distributed.topology import Topology
from pipeline.engine.build import build_engine
from pipeline.engine.engine import Engine

# Relative to a gradient's norm. fp32: sums in another order, and a GPU's products in place of a
# CPU's; bf16: 8 bits of mantissa through some layers. A gradient that is left out or counted twice
# is off by a half at least.
_TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}
_MOMENT = "exp_avg"
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")


class _Compared(NamedTuple):
    """What rank 0 found.

    Attributes:
        name: of the parameter whose gradient is furthest away.
        difference: of it, relative to its norm.
        compared: parameters.
    """

    name: str
    difference: float
    compared: int


def _gradients(context: Context) -> _Compared | None:
    """A step in the run's layout, and on rank 0 its comparison with one process."""
    topology = context.topology
    assert topology is not None, "the layout needs its ranks"
    trial = trial_config(context.config, "tiny", context.precision)
    folder = context.folder
    reference: subprocess.Popen[str] | None = None
    if context.info.rank == 0:
        reference = _start_reference(context, trial, topology.data_size)
    engine = _engine(trial, context, topology)
    batches = trial_batches(trial, 0, topology.data_rank, topology.data_size)
    engine.train_step(batches, trial.optimizer.learning_rate)
    engine.snapshot().write(folder / "layout")
    from_all(None)  # all have written
    if reference is None:
        return None
    _, errors = reference.communicate()
    if reference.returncode:
        last = (errors.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"one process could not train the tiny model: {last}")
    return _compare(context, trial)


def _start_reference(context: Context, trial: RunConfig, data_size: int) -> "subprocess.Popen[str]":
    path = context.folder / "one_process.yaml"
    write_synced(path, to_yaml(one_process_config(trial)).encode())
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCHER and not name.startswith(("SLURM_", "TORCHELASTIC_"))
    }
    code = (
        "import sys; from pathlib import Path\n"
        "from pipeline.diagnosis.one_process import write_state\n"
        "write_state(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))"
    )
    arguments = [str(path), str(context.folder / "one_process"), str(data_size)]
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        env=environment | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _engine(trial: RunConfig, context: Context, topology: Topology) -> Engine:
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its partition
        return build_engine(trial, topology, context.precision)


def _compare(context: Context, trial: RunConfig) -> _Compared:
    ours = StateFiles(context.folder / "layout", trial.model)
    theirs = StateFiles(context.folder / "one_process", trial.model)
    worst, names = _Compared("", 0.0, 0), list(parameter_shapes(trial.model))
    for name in names:
        wanted = theirs.whole(_MOMENT, name)
        away = float((ours.whole(_MOMENT, name) - wanted).norm() / wanted.norm())
        if not away <= worst.difference:  # also one that is not a number
            worst = _Compared(name, away, len(names))
    return worst._replace(compared=len(names))


def _judge_gradients(context: Context, ranks: list[Any]) -> Outcome:
    found: _Compared = ranks[0]
    allowed = _TOLERANCE[context.precision]
    figure = (
        f"a step of a tiny model, {found.compared} gradients of this layout at most "
        f"{found.difference:.1e} from one process ({context.precision})"
    )
    if found.difference <= allowed:
        return Outcome(figure)
    return Outcome(
        figure,
        [
            f"the gradient of {found.name} in this layout is {found.difference:.1e} away from that "
            f"of one process, and {allowed:g} is what rounding explains; do not train so: compare "
            "versions with constraints.txt, try parallel.zero=0 or fewer nodes to find which part "
            "is wrong, and report it"
        ],
    )


class _Step(NamedTuple):
    """A rank's steps at full width.

    Attributes:
        seconds: of the last one.
        losses: sum of the heads' mean losses, of the last one.
        peak_bytes: of the GPU's memory; 0 on a CPU.
    """

    seconds: float
    losses: float
    peak_bytes: int


def _steps(context: Context, count: int, width: Width = "own") -> _Step:
    topology = context.topology
    assert topology is not None, "the layout needs its ranks"
    trial = trial_config(context.config, width, context.precision)
    engine = _engine(trial, context, topology)
    seconds, losses = 0.0, math.nan
    for step in range(count):
        batches = trial_batches(trial, step, topology.data_rank, topology.data_size)
        started = time.perf_counter()
        result = engine.train_step(batches, trial.optimizer.learning_rate)
        losses = float(result.head_losses.sum())  # waits for the device
        seconds = time.perf_counter() - started
    peak = 0
    if context.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(context.device)
    return _Step(seconds, losses, peak)


def training_checks(steps: int) -> tuple[Check, ...]:
    """The checks; the second one if steps at full width are asked for."""

    def judge(context: Context, ranks: list[_Step]) -> Outcome:
        slowest = max(range(len(ranks)), key=lambda rank: ranks[rank].seconds)
        trial = trial_config(context.config, "own", context.precision)
        memory = max(rank.peak_bytes for rank in ranks)
        figure = (
            f"{trial.model.layers} of {context.config.model.layers} layers at full width: step "
            f"{steps} in {ranks[slowest].seconds:.2f} s, losses of all heads {ranks[0].losses:.2f}"
        )
        figure += f", at most {memory / 2**30:.1f} GiB" if memory else ""
        if math.isfinite(ranks[0].losses):
            return Outcome(figure)
        return Outcome(
            figure,
            [
                "the loss of a fresh model on random tokens is not finite; do not train so: try "
                "train.attention=math and train.precision=fp32 to find which part is wrong"
            ],
        )

    found = [Check("gradients", _gradients, _judge_gradients, patience=4)]
    if steps:
        found.append(Check("step", lambda context: _steps(context, steps), judge, patience=4))
    return tuple(found)
