"""Plans as text for a person and as JSON for a program."""

from collections.abc import Sequence
from typing import Any

from pipeline.planning.rank_memory import RankMemory
from pipeline.planning.run_plan import RunPlan, RunTime
from pipeline.planning.search import Candidate
from pipeline.planning.traffic import Traffic

_GIB = 2**30
# Attributes of a `RankMemory` in the order in which they are shown: of computing, then totals.
_ITEMS = (
    "weights",
    "optimizer",
    "gradients",
    "bucket",
    "gathered",
    "neighbors_copy",
    "activations",
    "passing",
    "logits",
    "lm_head",
)
_TOTALS = {
    "computing": "computing_total",
    "reducing": "reducing_total",
    "stepping": "stepping_total",
    "resume": "resume_total",
}
_LINKS = {True: "within a node", False: "between nodes"}


def plan_lines(plan: RunPlan, time: RunTime, price: float | None) -> list[str]:
    """What a run comes to, in lines of a label and its figures."""
    layout, machine, config = plan.layout, plan.machine, plan.config
    lines = [
        f"run           {config.run.name}, {config.model.num_parameters():,} parameters",
        f"layout        {layout.ranks} x {machine.name} = {layout.data} data x {layout.tensor} "
        f"tensor x {len(layout.plan)} stages, ZeRO {layout.zero}, "
        f"{'bf16' if machine.element_bytes == 2 else 'fp32'}, micro-batch {layout.micro_size}, "
        f"accumulation {layout.accumulation}, activation checkpointing {layout.checkpointing}",
        f"step          {plan.tokens_per_step:,} tokens = {layout.samples} samples",
        "",
        *_memory_lines(plan.memory),
        "",
        *_traffic_lines(plan.traffic()),
        "",
        f"time          {time.step_s:.3g} s a step, {time.tokens_per_s:,.0f} tokens/s "
        f"({time.tokens_per_s / layout.ranks:,.0f} a GPU), {time.flops_per_gpu / 1e12:.0f} useful "
        "TFLOP/s a GPU",
        f"run           {config.last_step:,} steps: {time.days:.3g} days, "
        f"{time.gpu_hours:,.0f} GPU-hours{_cost(time, price)}",
    ]
    if len(layout.plan) > 1:
        shares = ", ".join(f"{share:.0%}" for share in time.idle)
        lines.append(f"idle          {shares} by stage")
    return lines


def memory_line(memory: Sequence[RankMemory]) -> str:
    """The stage that needs the most, in one line."""
    most = max(memory, key=lambda of_rank: of_rank.total)
    items = {name: getattr(most, name) for name in _ITEMS}
    shown = ", ".join(
        f"{name.replace('_', ' ')} {_gib(value)}" for name, value in items.items() if value
    )
    return f"{most.total / _GIB:.3g} GiB on a rank at most ({shown})"


def verdict_line(plan: RunPlan) -> str:
    """Whether it fits, and by how much."""
    peak, room = plan.peak_bytes / _GIB, plan.machine.memory_bytes / _GIB
    name = plan.machine.name
    if plan.fits:
        return f"fits          {peak:.1f} of {room:.1f} GiB that may be filled of {name}"
    stage = max(
        range(len(plan.memory)),
        key=lambda number: max(plan.memory[number].total, plan.memory[number].resume_total),
    )
    return (
        f"does not fit  stage {stage} needs {peak:.1f} GiB, and {room:.1f} GiB may be filled "
        f"of {name}"
    )


def candidate_lines(candidates: Sequence[Candidate]) -> list[str]:
    """A table of layouts, fastest first, each with what to give --set."""
    lines = ["  tokens/s   GiB  layout"]
    for candidate in candidates:
        layout = candidate.plan.layout
        shares = f"{layout.data} data x {layout.tensor} tensor x {len(layout.plan)} stages"
        lines.append(
            f"{candidate.time.tokens_per_s:10,.0f} {candidate.plan.peak_bytes / _GIB:5.1f}  "
            f"{shares}, ZeRO {layout.zero}"
        )
        settings = candidate.settings()
        lines.append(f"{'':18}{f'--set {settings}' if settings else 'as it is'}")
    return lines


def plan_record(plan: RunPlan, time: RunTime, price: float | None) -> dict[str, Any]:
    """The same as plain values: bytes, seconds, tokens."""
    layout = plan.layout
    return {
        "run": plan.config.run.name,
        "gpu": plan.machine.name,
        "ranks": layout.ranks,
        "data": layout.data,
        "tensor": layout.tensor,
        "stages": len(layout.plan),
        "zero": layout.zero,
        "fits": plan.fits,
        "peak_bytes": plan.peak_bytes,
        "memory_bytes": plan.machine.memory_bytes,
        "tokens_per_step": plan.tokens_per_step,
        "memory": [
            {name: getattr(memory, name) for name in _ITEMS}
            | {name: getattr(memory, total) for name, total in _TOTALS.items()}
            for memory in plan.memory
        ],
        "traffic": [[traffic._asdict() for traffic in stage] for stage in plan.traffic()],
        "time": time._asdict(),
        "cost": None if price is None else price * time.gpu_hours,
    }


def candidate_record(candidate: Candidate, price: float | None) -> dict[str, Any]:
    """A layout of a search as plain values."""
    return plan_record(candidate.plan, candidate.time, price) | {"set": dict(candidate.changes)}


def _cost(time: RunTime, price: float | None) -> str:
    if price is None:
        return ""
    return f", {price * time.gpu_hours:,.0f} at {price:g} a GPU-hour"


def _memory_lines(memory: Sequence[RankMemory]) -> list[str]:
    """A column for each stage; items that are nothing everywhere are left out."""
    lines = [_row("memory, GiB of a rank", [f"stage {number}" for number in range(len(memory))])]
    for name in _ITEMS:
        values = [getattr(of_rank, name) for of_rank in memory]
        if any(values):
            lines.append(_row(f"  {name.replace('_', ' ')}", [_gib(value) for value in values]))
    for name, total in _TOTALS.items():
        values = [getattr(of_rank, total) for of_rank in memory]
        lines.append(_row(f"= {name}", [_gib(value) for value in values]))
    return lines


def _traffic_lines(stages: Sequence[Sequence[Traffic]]) -> list[str]:
    """A row for each purpose, a column for each stage."""
    purposes = list(dict.fromkeys((t.what, t.within_node) for stage in stages for t in stage))
    if not purposes:
        return ["traffic       none"]
    lines = ["traffic, GB that a rank receives in a step, by stage"]
    for what, within_node in purposes:
        values = [
            sum(t.received for t in stage if (t.what, t.within_node) == (what, within_node))
            for stage in stages
        ]
        shown = " ".join(f"{value / 1e9:9.3g}" for value in values)
        lines.append(f"  {what}, {_LINKS[within_node]}: {shown}")
    return lines


def _row(label: str, cells: Sequence[str]) -> str:
    return f"{label:24}{' '.join(f'{cell:>9}' for cell in cells)}"


def _gib(value: float) -> str:
    return f"{value / _GIB:.2f}"
