"""The stages benchmark: its formulas, and its arms on a tiny model."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.layout_model import (
    Layout,
    Machine,
    Work,
    all_reduce_s,
    layer_matrices,
    memory,
    micro_batch_cost,
    predict,
    ring_s,
    step_flops,
)
from benchmarks.ranks import run_ranks
from benchmarks.stage_arms import Rates, measure_rates, run_arm, run_config
from benchmarks.stages import ARMS, FULL, PRELOAD, QUICK, describe
from benchmarks.stages_simulation import INFINIBAND, fastest, layouts, samples_near, write_section
from model.config import ModelConfig
from model.part import ModelPart
from pipeline.config.run_config import load_config
from pipeline.stages.costs import predicted_idle, stage_costs
from pipeline.stages.plan import balanced_plan, depths

ROOT = Path(__file__).resolve().parents[2]
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


@pytest.fixture
def work() -> Work:
    """The 7B model."""
    return Work(load_config(ROOT / "configs" / "7b.yaml").model, sequence_length=4096)


def _layout(model: ModelConfig, stages: int = 1, **changes: int) -> Layout:
    layout = Layout(
        balanced_plan(stages, model), data=1, tensor=1, zero=1, micro_size=1, accumulation=4
    )
    return replace(layout, **changes)  # type: ignore[arg-type]


def test_one_rank_computes_and_does_nothing_else(work: Work) -> None:
    """A step takes its floating point operations over the rank's rate, exactly."""
    layout = _layout(work.model)
    assert predict(work, layout, MACHINE).step_s == pytest.approx(step_flops(work, layout) / 1e14)
    again = replace(layout, recompute=True)
    layers = step_flops(work, layout) - 4 * 6 * 4096 * 4 * work.model.vocab_size * 4096
    assert predict(work, again, MACHINE).step_s == pytest.approx(
        (step_flops(work, layout) + layers / 3) / 1e14
    )


def test_traffic_has_the_volume_of_rings(work: Work) -> None:
    """7 of 8 parts arrive in a gather, twice that in an all-reduce; between nodes, slower."""
    layout = _layout(work.model, data=8)
    assert ring_s(8e9, layout, MACHINE) == pytest.approx(0.07)
    assert all_reduce_s(8e9, 8, 1e11, 0.0) == pytest.approx(0.14)
    two_nodes = replace(layout, data=16)  # one group has all 8 links of a node, 80 GB/s
    assert ring_s(8e9, two_nodes, MACHINE) == pytest.approx(15 / 16 * 0.1)
    shared = replace(layout, data=16, tensor=8)  # 8 groups have one link each
    assert ring_s(8e9, shared, MACHINE) == pytest.approx(15 / 16 * 0.8)
    slow = replace(MACHINE, latency_s=1e-3)
    assert ring_s(8e9, layout, slow) == pytest.approx(0.07 + 7e-3)


def test_zero_3_gathers_twice_and_scatters_once(work: Work) -> None:
    """Per layer and micro-batch; hidden behind computing where that overlaps and is longer."""
    part = ModelPart(range(1, 8), range(0))
    plain = _layout(work.model, data=8)
    partitioned = replace(plain, zero=3)
    extra = [
        ours - theirs
        for ours, theirs in zip(
            micro_batch_cost(work, partitioned, MACHINE, part),
            micro_batch_cost(work, plain, MACHINE, part),
            strict=True,
        )
    ]
    gather = 7 * 7 / 8 * layer_matrices(work.model) * 2 / 1e11
    assert extra == pytest.approx([gather, 0.0, 2 * gather])
    overlapping = replace(MACHINE, overlaps=True)
    assert micro_batch_cost(work, partitioned, overlapping, part) == micro_batch_cost(
        work, plain, overlapping, part
    )


def test_bubbles_are_those_of_the_stage_plan(work: Work) -> None:
    """Without traffic the idle shares are what the dry run predicts, but for attention."""
    layout = _layout(work.model, stages=5, accumulation=16)
    free = replace(MACHINE, intra_bandwidth=float("inf"))
    costs = stage_costs(layout.plan, work.model, recompute=False)
    expected = predicted_idle(costs, depths(layout.plan), 16)
    assert predict(work, layout, free).idle == pytest.approx(expected, abs=0.04)


def test_stages_divide_memory_and_keep_micro_batches(work: Work) -> None:
    """States follow the stage's parameters; what is kept, its depth."""
    five = _layout(work.model, stages=5, accumulation=16)
    of_stages = [memory(work, five, MACHINE, stage) for stage in range(5)]
    assert max(of_stages) == of_stages[0]
    assert of_stages[4] == min(of_stages)  # heads keep z alone
    # 4 for norms, 4 for attention, the feed-forward layer; 136 bytes for heads and norms.
    token = (8 * 4096 + 3 * 11008) * 2 + 136
    assert work.model.kv_heads == 32
    assert of_stages[1] - of_stages[2] == pytest.approx(7 * token * 4096)
    partitioned = replace(five, zero=3, data=8)
    assert memory(work, partitioned, MACHINE, 1) < of_stages[1]


def test_the_fastest_layout_fits_and_is_one_of_those_asked_for(work: Work) -> None:
    """The search finds, for each kind, a layout of all GPUs with the step's samples."""
    for gpus in (8, 24):
        step = samples_near(gpus)
        assert step % gpus == 0
        assert all(x.ranks == gpus for x in layouts(work.model, gpus, step))
    best = fastest(work, replace(INFINIBAND, memory_bytes=60e9), 8)
    assert best["ZeRO-1"] is not None
    assert best["stages"] is not None
    for found in filter(None, best.values()):
        layout = found.layout
        assert layout.ranks == 8
        assert layout.data * layout.micro_size * layout.accumulation == 2048
        assert max(found.prediction.memory_bytes) <= 60e9


@pytest.mark.stress
def test_arms_train_the_same_model_and_fill_the_table() -> None:
    """Ours in one and two stages and DeepSpeed's PipelineModule begin with the same loss."""
    arms = [arm for arm in ARMS if arm.world == 2]
    assert len({arm: run_config(FULL, arm).stage_plan for arm in ARMS}) == len(ARMS)
    results = {arm: [run_ranks(2, PRELOAD, run_arm, QUICK, arm, 2)] for arm in arms}
    losses = [rounds[0][0].first_loss for rounds in results.values()]
    assert losses == pytest.approx([losses[0]] * len(arms), rel=1e-5)
    for arm, rounds in results.items():
        for result in rounds[0]:
            assert len(result.step_s) == 2
            assert result.peak_bytes > 0
            assert len(result.idle) == (2 if arm.name == "auto:2" else 0)
    rates = run_ranks(2, PRELOAD, measure_rates, QUICK, 5)
    assert all(rate > 0 for rank in rates for rate in rank)
    text = describe(QUICK, results, Rates(*rates[0]))
    assert text.count("| 2 | ") == len(arms)
    assert text.count("| auto:2 | ") == 2


def test_tables_go_between_their_markers(tmp_path: Path) -> None:
    """Everything else in the file stays."""
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- x begin -->\nold\n<!-- x end -->\nb\n")
    write_section(readme, "x", "new")
    assert readme.read_text() == "a\n<!-- x begin -->\nnew\n<!-- x end -->\nb\n"
