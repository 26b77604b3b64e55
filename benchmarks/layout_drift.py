"""How far layouts drift apart, beside how far one process drifts from itself.

Layouts add the same numbers up in another order, so they differ by roundings, and training makes
of one rounding what it makes of it: the yardstick is a run of one process whose initial weights
were disturbed by one rounding of fp32.

`python benchmarks/layout_drift.py [--steps N] [--output DIR]` prints the table; with --output it
writes it to README.md there and the raw numbers to results/.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__" and not __package__:
    # Run by path, Python puts this folder first; the packages are found from its parent.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.ranks import run_ranks
from benchmarks.tables import machine_line, replace_section

ROWS, SEQUENCE, VOCABULARY, HEADS = 8, 64, 512, 3


class Layout(NamedTuple):
    """How a run is spread, and whether its initial weights are disturbed by one rounding."""

    world: int = 1
    zero: int = 0
    tensor: int = 1
    stages: Any = 1
    backward: str = "sequential"
    disturbed: bool = False


LAYOUTS = {
    "one process, disturbed by one rounding": Layout(disturbed=True),
    "one process, joint backward": Layout(backward="joint"),
    "2 data-parallel, no ZeRO": Layout(world=2),
    "2 data-parallel, ZeRO-1": Layout(world=2, zero=1),
    "2 data-parallel, ZeRO-2": Layout(world=2, zero=2),
    "2 data-parallel, ZeRO-3": Layout(world=2, zero=3),
    "2 tensor-parallel": Layout(world=2, tensor=2),
    "2 stages": Layout(world=2, stages=[{"trunk": "0-4"}, {"heads": "1-3"}]),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, prog="layout_drift.py")
    parser.add_argument("--steps", type=int, default=40, metavar="N")
    parser.add_argument("--output", type=Path, metavar="DIR", help="where README.md is")
    options = parser.parse_args(arguments)
    truth = _course(Layout(), options.steps)
    drifts = {}
    for name, layout in LAYOUTS.items():
        drifts[name] = _drift(_course(layout, options.steps), truth)
        print(name, {key: max(values) for key, values in drifts[name].items()}, file=sys.stderr)
    section = _section(drifts, options.steps)
    print(section)
    if options.output is not None:
        replace_section(options.output / "README.md", "layout_drift", section)
        raw = options.output / "results" / "layout_drift.json"
        raw.write_text(json.dumps(drifts, indent=1) + "\n", encoding="utf-8")
    return 0


def _course(layout: Layout, steps: int) -> list[list[float]]:
    """Losses of all heads and the gradient norm of every step."""
    return run_ranks(layout.world, "benchmarks.layout_drift", _train, layout, steps)[0]


def _drift(course: list[list[float]], truth: list[list[float]]) -> dict[str, list[float]]:
    """Relative differences of each step: the largest of the losses, and the norm's."""
    pairs = list(zip(course, truth, strict=True))
    return {
        "loss": [
            max(abs(a / b - 1) for a, b in zip(found[:-1], wanted[:-1], strict=True))
            for found, wanted in pairs
        ],
        "norm": [abs(found[-1] / wanted[-1] - 1) for found, wanted in pairs],
    }


def _section(drifts: dict[str, dict[str, list[float]]], steps: int) -> str:
    lines = [
        f"| against one process | losses, step 1 | losses, {steps} steps | norm, step 1 "
        f"| norm, {steps} steps |",
        "|---|---|---|---|---|",
    ]
    for name, drift in drifts.items():
        figures = [f(drift[key]) for key in ("loss", "norm") for f in (lambda v: v[0], max)]
        lines.append(f"| {name} | " + " | ".join(f"{figure:.1e}" for figure in figures) + " |")
    return "\n".join([machine_line(), "", *lines])


def _train(layout: Layout, steps: int) -> list[list[float]]:
    """Train in this rank of the layout."""
    import torch

    from data_prep.loading.loader import Batch
    from pipeline.config.run_config import RunConfig
    from pipeline.distributed.rendezvous import rank_info
    from pipeline.distributed.topology import Topology
    from pipeline.engine.build import build_engine

    config = RunConfig.model_validate(_configuration(layout))
    topology = Topology(
        rank_info(os.environ), layout.tensor, torch.device("cpu"), plan=config.stage_plan
    )
    engine = build_engine(config, topology, "fp32")
    if layout.disturbed:
        generator = torch.Generator().manual_seed(1)
        for parameter in engine.model.parameters():
            signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            parameter.data.mul_(1 + signs * 2.0**-23)
    rows = slice(topology.data_rank, None, topology.data_size)
    course = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step % 10)  # ten batches, so that it learns them
        window = torch.randint(0, VOCABULARY, (ROWS, SEQUENCE + HEADS), generator=generator)[rows]
        labels = torch.stack([window[:, k : k + SEQUENCE] for k in range(1, HEADS + 1)])
        batch = Batch(window[:, :SEQUENCE].contiguous(), labels)
        result = engine.train_step([batch], learning_rate=1e-3)
        course.append([*result.head_losses.tolist(), result.grad_norm])
    return course


def _configuration(layout: Layout) -> dict[str, Any]:
    return {
        "run": {"name": "drift", "seed": 7},
        "model": {
            "layers": 8,
            "hidden_size": 128,
            "attention_heads": 4,
            "vocab_size": VOCABULARY,
            "future_tokens": HEADS,
        },
        "data": {"shards": "unused", "sequence_length": SEQUENCE},
        "parallel": {"tensor": layout.tensor, "zero": layout.zero, "stages": layout.stages},
        "batch": {"micro_size": ROWS * layout.tensor // layout.world if layout.stages == 1 else 8},
        "train": {
            "steps": 1000,
            "precision": "fp32",
            "device": "cpu",
            "head_backward": layout.backward,
        },
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"warmup_steps": 1},
    }


if __name__ == "__main__":
    sys.exit(main())
