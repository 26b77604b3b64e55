"""Memory that `pipeline.plan` predicts, against the tensors that training really holds.

`python benchmarks/plan.py [--quick] [--write]` trains a small model in each layout for six steps,
ranks over gloo on this CPU, and counts the bytes of all living tensors: weights, gradients,
optimizer states, buckets, what autograd keeps, whatever else is there. What is left after the
last step, and its most while gradients are computed and while the optimizer moves, are compared
with the formulas of `pipeline/planning/rank_memory.py`, for the stage where the two are furthest
apart. With --write the table goes to README.md beside this file. Exit status 1 where they are more
than a tenth apart.
"""

import argparse
import contextlib
import gc
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

if __name__ == "__main__" and not __package__:
    # Run by path, Python puts this folder first; the packages are found from its parent.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.ranks import run_ranks
from benchmarks.tables import machine_line, replace_section
from pipeline.config.run_config import Precision, RunConfig
from pipeline.planning.layout import Checkpointing
from pipeline.planning.rank_memory import RankMemory
from pipeline.planning.run_plan import run_memory

PRELOAD = "benchmarks.stage_arms"
TOLERANCE = 0.1
KIB = 1024
Kind = Literal["states", "computing", "stepping"]


@dataclass(frozen=True)
class Case:
    """A layout whose memory is counted."""

    world: int
    zero: int
    precision: Precision = "fp32"
    tensor: int = 1
    stages: int | str = 1
    heads: int = 2
    checkpointing: Checkpointing = "none"
    accumulation: int = 3
    micro_size: int = 2
    bucket: int = 100_000
    neighbors: int = 1

    def describe(self) -> str:
        """For the table."""
        stages = 1 if isinstance(self.stages, int) else int(self.stages.removeprefix("auto:"))
        data = self.world // (self.tensor * stages)
        text = f"{data} x {self.tensor} x {stages}, ZeRO {self.zero}"
        return text + (f", hpZ {self.neighbors}" if self.neighbors > 1 else "")


CASES = (
    Case(1, 0),
    Case(2, 0, accumulation=1, heads=1),
    Case(2, 1),
    Case(2, 2, heads=4, checkpointing="full"),
    Case(2, 3, heads=3, checkpointing="selective"),
    Case(1, 0, "bf16", heads=4),
    Case(2, 1, "bf16", checkpointing="full"),
    Case(2, 2, "bf16"),
    Case(2, 3, "bf16", heads=3, accumulation=1),
    Case(2, 0, tensor=2, heads=3),
    Case(2, 1, "bf16", tensor=2, checkpointing="selective"),
    Case(4, 3, tensor=2, heads=1),
    Case(2, 1, stages="auto:2", heads=2, accumulation=4),
    Case(3, 0, stages="auto:3", heads=1, checkpointing="full", accumulation=4),
    Case(4, 3, "bf16", stages="auto:2", heads=4, accumulation=4),
    Case(4, 2, "bf16", tensor=2, heads=2, bucket=50_000),
    Case(4, 3, "bf16", heads=2, neighbors=2),
    Case(4, 1, "bf16", tensor=2, stages="auto:2", heads=3, accumulation=4),
)
QUICK = (CASES[0], CASES[7], CASES[12])


class Counted(NamedTuple):
    """The most bytes that a rank held in its last step.

    Attributes:
        computing: until all gradients were there.
        stepping: while the optimizer moved.
        states: after the step: weights, optimizer states and buffers that stay.
    """

    computing: int
    stepping: int
    states: int


class Row(NamedTuple):
    """A case's figures, of one stage.

    Attributes:
        predicted: bytes by the formulas.
        measured: bytes that were counted there.
    """

    predicted: dict[Kind, float]
    measured: dict[Kind, float]

    def ratio(self, kind: Kind) -> float:
        """Predicted over measured."""
        return self.predicted[kind] / self.measured[kind]

    @property
    def total_ratio(self) -> float:
        """Of the most of both kinds, which decides whether a layout fits."""
        return max(self.predicted.values()) / max(self.measured.values())

    @property
    def error(self) -> float:
        """How far apart the two are."""
        return max(abs(self.ratio(kind) - 1) for kind in self.predicted)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, prog="plan.py")
    parser.add_argument("--quick", action="store_true", help="three of the layouts")
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    options = parser.parse_args(arguments)
    rows: dict[Case, Row] = {}
    for case in QUICK if options.quick else CASES:
        rows[case] = compare(case)
        print(f"{case.describe()}: {rows[case].total_ratio:.3f}", file=sys.stderr, flush=True)
    section = table(rows)
    print(section)
    if options.write:
        replace_section(Path(__file__).resolve().parent / "README.md", "plan", section)
    return 0 if all(row.error <= TOLERANCE for row in rows.values()) else 1


def table(rows: dict[Case, Row]) -> str:
    """The Markdown of a run."""
    worst = max(rows.values(), key=lambda row: row.error)
    lines = [
        f"{machine_line()} {len(rows)} layouts of a small model, KiB of the stage furthest from "
        f"its prediction; the furthest of all is {worst.error:.1%} away.",
        "",
        "| data x tensor x stages | arithmetic | heads | checkpointing | accumulation | states: "
        "predicted | measured | ratio | computing: predicted | measured | ratio | stepping: "
        "predicted | measured | ratio | most: ratio |",
        f"|{'---|' * 15}",
    ]
    for case, row in rows.items():
        cells = [
            case.describe(),
            case.precision,
            str(case.heads),
            case.checkpointing,
            str(case.accumulation),
        ]
        for kind in row.predicted:
            cells += [
                f"{row.predicted[kind] / KIB:,.0f}",
                f"{row.measured[kind] / KIB:,.0f}",
                f"{row.ratio(kind):.3f}",
            ]
        lines.append(f"| {' | '.join([*cells, f'{row.total_ratio:.3f}'])} |")
    return "\n".join(lines)


def compare(case: Case) -> Row:
    """Train in a layout, and predict it; the stage that differs most."""
    config = run_config(case)
    counted = run_ranks(case.world, PRELOAD, count_rank, config)
    predicted = run_memory(config, world_size=case.world, device="cpu", precision=case.precision)
    ranks = case.world // len(predicted)
    rows = [
        _row(memory, counted[stage * ranks : (stage + 1) * ranks])
        for stage, memory in enumerate(predicted)
    ]
    return max(rows, key=lambda row: row.error)


def _row(memory: RankMemory, counted: Sequence[Counted]) -> Row:
    computing = max(memory.computing_total, memory.reducing_total)
    return Row(
        {
            "states": memory.states_total,
            "computing": computing,
            "stepping": memory.stepping_total,
        },
        {
            "states": max(rank.states for rank in counted),
            "computing": max(rank.computing for rank in counted),
            "stepping": max(rank.stepping for rank in counted),
        },
    )


def run_config(case: Case) -> RunConfig:
    """The run that a case is."""
    sections: dict[str, Any] = {
        "run": {"name": "plan", "seed": 7},
        "model": {
            "layers": 8,
            "hidden_size": 64,
            "attention_heads": 4,
            "kv_heads": 2,
            "ffn_hidden_size": 192,
            "vocab_size": 512,
            "future_tokens": case.heads,
        },
        "data": {"shards": "unused", "sequence_length": 64},
        "parallel": {
            "zero": case.zero,
            "tensor": case.tensor,
            "stages": case.stages,
            "reduce_bucket_size": case.bucket,
            "zero_hpz_partition_size": case.neighbors,
        },
        "batch": {"micro_size": case.micro_size, "accumulation": case.accumulation},
        "train": {
            "steps": 10,
            "device": "cpu",
            "precision": case.precision,
            "activation_checkpointing": case.checkpointing,
            "loss_chunk_tokens": 32,
        },
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"warmup_steps": 0},
    }
    return RunConfig.model_validate(sections)


def count_rank(config: RunConfig) -> Counted:
    """Six steps of this rank, the last one counted; call in a fresh rank."""
    import torch

    from benchmarks.live_tensors import LiveTensorMeter
    from benchmarks.stage_arms import Workload, local_batches
    from pipeline.distributed.agreement import RankFlags
    from pipeline.distributed.rendezvous import rank_info
    from pipeline.distributed.topology import Topology
    from pipeline.engine.build import build_engine

    precision: Precision = "bf16" if config.train.precision == "bf16" else "fp32"
    with LiveTensorMeter() as meter, contextlib.redirect_stdout(io.StringIO()):
        topology = Topology(
            rank_info(os.environ),
            config.parallel.tensor,
            torch.device("cpu"),
            plan=config.stage_plan,
            timeout_s=120,
        )
        engine = build_engine(config, topology, precision)
        workload = Workload(
            layers=config.model.layers,
            hidden_size=config.model.hidden_size,
            vocab_size=config.model.vocab_size,
            future_tokens=config.model.future_tokens,
            sequence_length=config.data.sequence_length,
            samples=config.global_batch_size(topology.data_size),
            micro_size=config.batch.micro_size,
            chunk_tokens=config.train.chunk_tokens("cpu"),
        )
        computing = 0

        def flags() -> RankFlags:
            # Asked for once all gradients are there, before the optimizer moves.
            nonlocal computing
            computing = meter.peak
            meter.restart_peak()
            return RankFlags()

        for step in range(6):  # ZeRO-3 learns the order of modules from the first ones
            batches = local_batches(workload, step, topology.data_rank, topology.data_size)
            gc.collect()
            meter.restart_peak()
            engine.train_step(batches, 1e-3, flags)
        stepping = meter.peak
        gc.collect()
        return Counted(computing, stepping, meter.alive)


if __name__ == "__main__":
    sys.exit(main())
