"""The stages benchmark: its search, and its arms on a tiny model."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.ranks import run_ranks
from benchmarks.stage_arms import Rates, measure_rates, run_arm, run_config
from benchmarks.stages import ARMS, FULL, PRELOAD, QUICK, describe
from benchmarks.stages_simulation import INFINIBAND, fastest, layouts, samples_near
from benchmarks.tables import replace_section
from pipeline.planning.layout import Work
from tests.support.planning_cases import seven_billion_work


@pytest.fixture
def work() -> Work:
    """The 7B model."""
    return seven_billion_work()


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
        assert found.peak_bytes <= 60e9


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
    replace_section(readme, "x", "new")
    assert readme.read_text() == "a\n<!-- x begin -->\nnew\n<!-- x end -->\nb\n"
