"""Machines and layouts for tests of plans."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from model.config import ModelConfig
from pipeline.config.run_config import RunConfig, load_config
from pipeline.planning.layout import Layout, Machine, Work
from pipeline.stages.plan import balanced_plan

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MACHINE = Machine(
    name="round numbers",
    ranks_per_node=8,
    flops=1e14,
    lm_head_flops=1e14,
    intra_bandwidth=1e11,
    inter_bandwidth=1e10,
    latency_s=0.0,
    optimizer_s=0.0,
    memory_bytes=80e9,
    overlaps=False,
)


def seven_billion(*overrides: str) -> RunConfig:
    """The 7B run, with some values of its own."""
    return load_config(CONFIGS / "7b.yaml", overrides)


def seven_billion_work() -> Work:
    """Its model, in steps of 4,096 tokens a sequence."""
    return Work(seven_billion().model, sequence_length=4096)


def layout_of_stages(model: ModelConfig, stages: int = 1, **changes: Any) -> Layout:
    """One rank a stage, ZeRO-1, 4 micro-batches of a sequence; or as told."""
    layout = Layout(
        balanced_plan(stages, model), data=1, tensor=1, zero=1, micro_size=1, accumulation=4
    )
    return replace(layout, **changes)
