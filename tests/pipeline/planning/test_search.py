"""Layouts of the same step: what is found fits, by the rules and the formulas of a run."""

import shlex

import pytest

from model.errors import ConfigError
from pipeline.config.run_config import load_config
from pipeline.planning.gpus import GPUS, machine_of
from pipeline.planning.run_plan import plan_run, run_memory
from pipeline.planning.search import changed, enough_nodes, remedy, search
from tests.support.planning_cases import CONFIGS, seven_billion

A100 = machine_of("a100-40g")


def test_found_layouts_are_runs_of_the_same_step_that_fit() -> None:
    """Read back from their --set line, by the command's own way, each has the plan it came with."""
    config = seven_billion("batch.accumulation=8")
    samples = plan_run(config, 16, A100).layout.samples
    found = search(config, 16, A100)
    assert len(found) > 10
    times = [round(candidate.time.step_s, 3) for candidate in found]
    assert times == sorted(times)
    for candidate in found[:20]:
        overrides = shlex.split(candidate.settings())
        again = plan_run(
            load_config(CONFIGS / "7b.yaml", ["batch.accumulation=8", *overrides]), 16, A100
        )
        assert again.layout == candidate.plan.layout
        assert again.fits
        assert again.layout.ranks == 16
        assert again.layout.samples == samples
        assert again.peak_bytes == candidate.plan.peak_bytes


def test_a_remedy_changes_as_little_as_it_can() -> None:
    """One key where one is enough."""
    config = seven_billion()
    assert not plan_run(config, 8, A100).fits
    mend = remedy(config, 8, A100)
    assert mend is not None
    assert dict(mend.changes) == {"parallel.zero": 3}
    assert plan_run(changed(config, mend.changes), 8, A100).fits


def test_a_bucket_in_the_way_shrinks() -> None:
    """A small model with a bucket of 80 GB or more needs no other layout."""
    config = seven_billion("model.layers=8", "parallel.reduce_bucket_size=40000000000")
    mend = remedy(config, 8, machine_of("h100-80g"))
    assert mend is not None
    assert list(mend.changes) == ["parallel.reduce_bucket_size"]


def test_more_nodes_are_named_where_no_layout_fits() -> None:
    """7B does not go on one GPU of 40 GB; it does on some power of two."""
    config = seven_billion()
    assert remedy(config, 1, A100) is None
    enough = enough_nodes(config, 1, A100)
    assert enough is not None
    ranks, candidate = enough
    assert ranks > 1
    assert candidate.plan.layout.ranks == ranks
    assert candidate.plan.fits
    assert candidate.plan.layout.samples == plan_run(config, 1, A100).layout.samples


def test_stages_given_as_a_list_survive_the_shell() -> None:
    """A found layout may keep the configuration's own plan of stages, or leave it."""
    config = load_config(CONFIGS / "7b_staged.yaml")
    stages = len(config.stage_plan)
    for candidate in search(config, 8 * stages, A100)[:5]:
        overrides = shlex.split(candidate.settings())
        again = load_config(CONFIGS / "7b_staged.yaml", overrides)
        assert again.stage_plan == candidate.plan.layout.plan


def test_ranks_that_the_configuration_cannot_use_are_refused() -> None:
    """As a run refuses them."""
    with pytest.raises(ConfigError, match=r"parallel\.tensor=3|does not divide|do not divide"):
        plan_run(seven_billion("parallel.tensor=2"), 7, A100)


def test_a_plan_has_the_memory_of_the_dry_run() -> None:
    """One function gives both."""
    config = seven_billion()
    plan = plan_run(config, 64, machine_of("h100-80g"))
    assert plan.memory == run_memory(config, world_size=64, device="cuda", precision="bf16")


@pytest.mark.parametrize("name", sorted(GPUS))
def test_machines_reach_less_than_data_sheets_say(name: str) -> None:
    """And what a network given by hand has, not that of the reference system."""
    machine, gpu = machine_of(name), GPUS[name]
    assert machine.flops < gpu.bf16_flops
    assert machine.memory_bytes < gpu.memory_bytes
    assert machine_of(name, element_bytes=4).flops < machine.flops
    slow = machine_of(name, network_gbit=gpu.network_gbit / 2)
    assert slow.inter_bandwidth == pytest.approx(machine.inter_bandwidth / 2)
