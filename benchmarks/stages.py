"""Pipeline stages against one stage and against DeepSpeed's PipelineModule, on the same ranks.

`python benchmarks/stages.py [--quick] [--write]` trains the same model on the same batches in each
way, in rounds: in every round each way runs in fresh processes (gloo, one torch thread a rank), so
that all meet the same other load, and ratios are taken within a round. It checks that the first
losses agree, prints speed, peak memory and idle shares beside what the stage plan and the formulas
of `pipeline/planning` predict, and with --write puts the table into README.md beside this file.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__" and not __package__:
    # Run by path, Python puts this folder first; the packages are found from its parent.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from benchmarks.memory_vs_heads import hardware, versions
from benchmarks.ranks import run_ranks
from benchmarks.stage_arms import (
    Arm,
    ArmResult,
    Rates,
    Workload,
    measure_rates,
    run_arm,
    run_config,
)
from benchmarks.tables import replace_section
from pipeline.planning.layout import Layout, Machine, Prediction, Work
from pipeline.planning.step_time import predict_time
from pipeline.stages.costs import predicted_idle, stage_costs
from pipeline.stages.plan import depths

FULL = Workload(
    layers=12,
    hidden_size=256,
    vocab_size=4096,
    future_tokens=4,
    sequence_length=128,
    samples=16,
    micro_size=2,
    chunk_tokens=128,
)
QUICK = Workload(
    layers=6,
    hidden_size=64,
    vocab_size=512,
    future_tokens=2,
    sequence_length=64,
    samples=8,
    micro_size=2,
    chunk_tokens=64,
)
TWO_HEAD_STAGES = ({"trunk": "0-3"}, {"trunk": "4-7"}, {"heads": "1-2"}, {"heads": "3-4"})
HEADS_LAST = ({"trunk": "0-2"}, {"trunk": "3-5"}, {"trunk": "6-7"}, {"heads": "1-4"})
# The first arm of each number of ranks is what the others are compared with.
ARMS = (
    Arm("one stage, ZeRO-1", 2, 1, zero=1),
    Arm("one stage, ZeRO-3", 2, 1, zero=3),
    Arm("auto:2", 2, "auto:2", zero=1),
    Arm("PipelineModule, the same 2 stages", 2, "auto:2", zero=1, engine="pipeline_module"),
    Arm("one stage, ZeRO-1", 4, 1, zero=1),
    Arm("one stage, ZeRO-3", 4, 1, zero=3),
    Arm("auto:2, ZeRO-1", 4, "auto:2", zero=1),
    Arm("auto:2, ZeRO-3", 4, "auto:2", zero=3),
    Arm("trunk, trunk, heads 1-2, heads 3-4", 4, TWO_HEAD_STAGES, zero=1),
    Arm("PipelineModule, 2 stages, ZeRO-1", 4, "auto:2", zero=1, engine="pipeline_module"),
    Arm("PipelineModule, 4 stages", 4, HEADS_LAST, zero=1, engine="pipeline_module"),
)
MIB = 2**20
PRELOAD = "benchmarks.stage_arms"
Rounds = dict[Arm, list[list[ArmResult]]]  # of each round, of each rank


class Row(NamedTuple):
    """An arm's line in the table.

    Attributes:
        tokens_per_s: median of the rounds' medians.
        ratios: speed over the first arm's with as many ranks, round by round.
        cpu_s: processor time of a step over all ranks, the median round's.
        peaks: bytes of each rank, the median round's.
        idle: measured share of each stage; empty where nobody counts.
    """

    tokens_per_s: float
    ratios: list[float]
    cpu_s: float
    peaks: list[float]
    idle: list[float]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; give its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, prog="stages.py")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, 2 ranks, one round")
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    parser.add_argument("--rounds", type=int, help="how often each way runs (default 3; quick 1)")
    options = parser.parse_args(arguments)
    workload, rounds, steps = (QUICK, 1, 2) if options.quick else (FULL, 3, 2)
    rounds = options.rounds or rounds
    arms = [arm for arm in ARMS if arm.world == 2 or not options.quick]
    rates = run_ranks(2, PRELOAD, measure_rates, workload, 5 if options.quick else 40)
    results = measure(workload, arms, rounds, steps)
    section = describe(workload, results, mean_rates(rates))
    print(section)
    if options.write:
        replace_section(Path(__file__).resolve().parent / "README.md", "stages cpu", section)
    return 0


def measure(workload: Workload, arms: Sequence[Arm], rounds: int, steps: int) -> Rounds:
    """Every arm once in each round; losses of the first step must agree."""
    results: Rounds = {arm: [] for arm in arms}
    losses: dict[Arm, float] = {}
    for number in range(rounds):
        for arm in arms:
            ranks = run_ranks(arm.world, PRELOAD, run_arm, workload, arm, steps)
            results[arm].append(ranks)
            losses[arm] = ranks[0].first_loss
            step_s = statistics.median(ranks[0].step_s)
            print(f"round {number + 1}: {arm.name}: {step_s:.2f} s", file=sys.stderr, flush=True)
    spread = max(losses.values()) / min(losses.values()) - 1
    assert spread < 1e-5, f"the arms do not train the same model: {losses}"
    return results


def summarize(workload: Workload, results: Rounds) -> dict[Arm, Row]:
    """Medians over the rounds."""
    tokens = workload.samples * workload.sequence_length
    rows: dict[Arm, Row] = {}
    seconds = {
        arm: [statistics.median(ranks[0].step_s) for ranks in rounds]
        for arm, rounds in results.items()
    }
    for arm, rounds in results.items():
        baseline = next(other for other in results if other.world == arm.world)
        pairs = zip(seconds[baseline], seconds[arm], strict=True)
        rows[arm] = Row(
            tokens / statistics.median(seconds[arm]),
            [theirs / ours for theirs, ours in pairs],
            statistics.median(sum(rank.cpu_s for rank in ranks) for ranks in rounds),
            [
                statistics.median(ranks[rank].peak_bytes for ranks in rounds)
                for rank in range(arm.world)
            ],
            [
                statistics.median(shares)
                for shares in zip(*(r[0].idle for r in rounds), strict=True)
            ],
        )
    return rows


def describe(workload: Workload, results: Rounds, rates: Rates) -> str:
    """The Markdown of a run."""
    rows = summarize(workload, results)
    model, rounds = workload.model, len(next(iter(results.values())))
    lines = [
        f"{hardware('cpu').partition(',')[0]}, {len(os.sched_getaffinity(0))} cores, one thread a "
        f"rank; {versions()}; {date.today().isoformat()}. {model.trunk_layers} trunk layers, "
        f"{model.future_tokens} heads, hidden size {model.hidden_size}, vocabulary "
        f"{model.vocab_size}, steps of {workload.samples} x {workload.sequence_length} tokens in "
        f"micro-batches of {workload.micro_size}, fp32. Rounds: {rounds}, "
        f"load of the machine at the end {os.getloadavg()[0]:.1f}.",
        "",
        "| ranks | | tokens/s | over the first (rounds) | CPU s of a step "
        "| peak of each rank, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for arm, row in rows.items():
        peaks = " ".join(f"{peak / MIB:.0f}" for peak in row.peaks)
        ratio, low, high = statistics.median(row.ratios), min(row.ratios), max(row.ratios)
        lines.append(
            f"| {arm.world} | {arm.name} | {row.tokens_per_s:,.0f} | {ratio:.2f} "
            f"({low:.2f} to {high:.2f}) | {row.cpu_s:.2f} | {peaks} |"
        )
    lines += ["", *_predictions(workload, rows, rates)]
    return "\n".join(lines)


def _predictions(workload: Workload, rows: dict[Arm, Row], rates: Rates) -> list[str]:
    """What was predicted for the arms with a core for each rank, beside what was measured."""
    lines = [
        f"Rates measured with 2 ranks at work: {rates.layer_flops / 1e9:.1f} GFLOP/s in layers, "
        f"{rates.lm_head_flops / 1e9:.1f} in the chunked loss, {rates.bandwidth / 1e9:.2f} GB/s in "
        "gathers.",
        "",
        "| 2 ranks | idle by stage: measured | by layer-equivalents | by the formulas "
        "| step predicted / measured |",
        "|---|---|---|---|---|",
    ]
    tokens = workload.samples * workload.sequence_length
    for arm, row in rows.items():
        if arm.world != 2 or arm.engine != "headway":
            continue
        config = run_config(workload, arm)
        plan = config.stage_plan
        costs = stage_costs(plan, config.model, recompute=False)
        by_weight = predicted_idle(costs, depths(plan, config.model), config.batch.accumulation)
        formulas = formula_prediction(workload, arm, rates)
        cells = [_shares(row.idle), _shares(by_weight), _shares(formulas.idle)]
        if len(plan) == 1:
            cells = ["-", "-", "-"]
        ratio = formulas.step_s / (tokens / row.tokens_per_s)
        lines.append(f"| {arm.name} | {' | '.join(cells)} | {ratio:.2f} |")
    return lines


def formula_prediction(workload: Workload, arm: Arm, rates: Rates) -> Prediction:
    """What the formulas of the simulation give with this machine's rates."""
    config = run_config(workload, arm)
    layout = Layout(
        config.stage_plan,
        data=arm.world // len(config.stage_plan),
        tensor=1,
        zero=arm.zero,
        micro_size=workload.micro_size,
        accumulation=config.batch.accumulation,
    )
    machine = Machine(
        name="this one",
        ranks_per_node=arm.world,
        flops=rates.layer_flops,
        lm_head_flops=rates.lm_head_flops,
        intra_bandwidth=rates.bandwidth,
        inter_bandwidth=rates.bandwidth,
        latency_s=rates.latency_s,
        optimizer_s=rates.optimizer_s,
        memory_bytes=float("inf"),
        element_bytes=torch.float32.itemsize,
        overlaps=False,
    )
    work = Work(workload.model, workload.sequence_length, workload.chunk_tokens)
    return predict_time(work, layout, machine)


def mean_rates(rates: Sequence[Rates]) -> Rates:
    """The ranks' mean of each rate."""
    return Rates(*(statistics.mean(values) for values in zip(*rates, strict=True)))


def _shares(idle: Sequence[float]) -> str:
    return ", ".join(f"{share:.0%}" for share in idle)


if __name__ == "__main__":
    sys.exit(main())
