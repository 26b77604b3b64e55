"""Which layout is fastest for the 7B model on 8 to 512 GPUs, by formulas of `pipeline/planning`.

`python benchmarks/stages_simulation.py [--write]` goes through every layout of stages x data x
tensor, ZeRO 1 and 3, micro-batch, with and without recomputation, at a step of 2048 samples of
4096 tokens (where these cannot be shared evenly, the number next to it); leaves out what needs more
memory than a GPU has; and prints the fastest with one stage and the fastest with several. With
--write the tables also go to README.md beside this file. Nothing here is measured;
benchmarks/stages.py holds the same formulas against small runs.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__" and not __package__:
    # Run by path, Python puts this folder first; the packages are found from its parent.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.tables import replace_section
from model.config import ModelConfig
from model.structure.part import ModelPart
from pipeline.config.run_config import load_config
from pipeline.planning.gpus import machine_of
from pipeline.planning.layout import Checkpointing, Layout, Machine, Prediction, Work
from pipeline.planning.rank_memory import rank_memory
from pipeline.planning.step_time import predict_time
from pipeline.stages.plan import balanced_plan, packed_plan

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = 2048
GPUS = (8, 16, 32, 64, 128, 256, 512)
STAGES = (1, 2, 4, 5, 8, 10, 16)
CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "full")
INFINIBAND = replace(machine_of("h100-80g"), name="H100, InfiniBand of 400 Gb/s for each GPU")
NO_OVERLAP = replace(
    INFINIBAND, name=f"{INFINIBAND.name}, ZeRO's traffic not overlapped at all", overlaps=False
)
ETHERNET = replace(
    machine_of("h100-80g", network_gbit=100 / 8),
    name="H100, Ethernet of 100 Gb/s for each node of 8 GPUs",
    latency_s=20e-6,
)
SMALL = replace(machine_of("a100-40g"), name="A100 with 40 GB, InfiniBand of 200 Gb/s for each GPU")
MACHINES = (INFINIBAND, NO_OVERLAP, ETHERNET, SMALL)


class Found(NamedTuple):
    """A layout with what it is predicted to do."""

    layout: Layout
    prediction: Prediction
    peak_bytes: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, prog="stages_simulation.py")
    parser.add_argument("--write", action="store_true", help="put the tables into README.md")
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS, metavar="N")
    options = parser.parse_args(arguments)
    work = Work(load_config(ROOT / "configs" / "7b.yaml").model, sequence_length=4096)
    section = "\n\n".join(table(work, m, options.gpus) for m in MACHINES)
    print(section)
    if options.write:
        replace_section(ROOT / "benchmarks" / "README.md", "stages_simulation", section)
    return 0


def layouts(model: ModelConfig, gpus: int, samples: int) -> Iterator[Layout]:
    """Every layout of so many GPUs whose step has exactly so many samples."""
    for count in STAGES:
        for plan in plans(count, model):
            for tensor in (1, 2, 4, 8):
                data, rest = divmod(gpus, count * tensor)
                if rest or not data:
                    continue
                for micro_size in (1, 2, 4, 8):
                    accumulation, rest = divmod(samples, data * micro_size)
                    if rest or not accumulation:
                        continue
                    for zero in (1, 3):
                        for checkpointing in CHECKPOINTING:
                            yield Layout(
                                plan, data, tensor, zero, micro_size, accumulation, checkpointing
                            )


def samples_near(gpus: int) -> int:
    """The step's samples: 2048, or the number next to it that so many GPUs can share evenly."""
    return max(round(SAMPLES / gpus), 1) * gpus


def plans(count: int, model: ModelConfig) -> set[tuple[ModelPart, ...]]:
    """The plans of so many stages: with heads apart from the trunk, and packed."""
    return {balanced_plan(count, model), packed_plan(count, model)}


def fastest(work: Work, machine: Machine, gpus: int) -> dict[str, Found | None]:
    """The fastest layouts that fit: with one stage and ZeRO-1 or 3, and with several stages."""
    best: dict[str, Found | None] = {"ZeRO-1": None, "ZeRO-3": None, "stages": None}
    for layout in layouts(work.model, gpus, samples_near(gpus)):
        stages = range(len(layout.plan))
        peak = max(rank_memory(work, layout, machine, stage).total for stage in stages)
        if peak > machine.memory_bytes:
            continue
        found = Found(layout, predict_time(work, layout, machine), peak)
        kind = "stages" if len(layout.plan) > 1 else f"ZeRO-{layout.zero}"
        rival = best[kind]
        if rival is None or found.prediction.step_s < rival.prediction.step_s:
            best[kind] = found
    return best


def table(work: Work, machine: Machine, gpus: Sequence[int]) -> str:
    """One machine's rows; the layout that wins in bold."""
    lines = [
        f"{machine.name}: {machine.flops / 1e12:.0f} TFLOP/s reached, "
        f"{machine.intra_bandwidth / 1e9:.0f} GB/s within a node and "
        f"{machine.inter_bandwidth / 1e9:.4g} GB/s for each GPU between nodes reached, "
        f"{machine.memory_bytes / 1e9:.0f} GB to fill.",
        "",
        "| GPUs | one stage, ZeRO-1 | one stage, ZeRO-3 | several stages | GB, idle "
        "| stages / one stage |",
        "|---|---|---|---|---|---|",
    ]
    for number in gpus:
        best = fastest(work, machine, number)
        times = {kind: found.prediction.step_s for kind, found in best.items() if found}
        winner = min(times, key=lambda kind: times[kind])
        cells = [
            f"**{text}**" if kind == winner else text
            for kind, text in ((kind, _cell(work, found)) for kind, found in best.items())
        ]
        staged, ratio = best["stages"], "-"
        detail = "-"
        if staged is not None:
            detail = f"{staged.peak_bytes / 1e9:.0f}, {max(staged.prediction.idle):.0%}"
            one = [times[kind] for kind in ("ZeRO-1", "ZeRO-3") if kind in times]
            ratio = f"{min(one) / times['stages']:.2f}" if one else "only stages fit"
        lines.append(f"| {number} | {' | '.join(cells)} | {detail} | {ratio} |")
    return "\n".join(lines)


def _cell(work: Work, found: Found | None) -> str:
    """Tokens per second and GPU, and the layout."""
    if found is None:
        return "does not fit"
    layout, seconds, _ = found
    tokens = layout.samples * work.sequence_length
    rate = tokens / seconds.step_s / layout.ranks
    stages = f"{len(layout.plan)} x " if len(layout.plan) > 1 else ""
    zero = f"Z{layout.zero} " if stages else ""
    return (
        f"{rate:,.0f}: {zero}{stages}{layout.data}d x {layout.tensor}t, "
        f"m{layout.micro_size}{' r' if layout.checkpointing == 'full' else ''}"
    )


if __name__ == "__main__":
    sys.exit(main())
