"""The one file that reads DeepSpeed's private parts: what it finds is the whole model, or an error.

These are the engine's contract with DeepSpeed; `test_deepspeed_versions.py` runs them on the oldest
and the newest version that setup.py allows.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from _pytest.mark import ParameterSet

from model.errors import ConfigError, TrainingError
from pipeline.config.run_config import Precision
from pipeline.engine import deepspeed_internals
from pipeline.engine.build import build_engine, check_coverage
from pipeline.engine.deepspeed_internals import share_of
from pipeline.engine.optimizer_share import Fragment
from tests.support.engine_cases import Case, build_topology, engine_config, local_batches
from tests.support.harness import RankFailedError, run_ranks

LAYOUTS = (
    Case(),
    Case(world=2),
    Case(world=2, tensor=2),
    Case(world=2, freeze="trunk"),
    Case(world=3, stages="trunk 0-2|heads 1-2|heads 3"),
)
DROPPED = "trunk.layers.0.block.mlp.linear_fc1.weight"


def _covered(case: Case, precision: Precision) -> set[str]:
    """Train a step; the checks at start and after it have passed, or this raises."""
    topology = build_topology(case)
    engine = build_engine(engine_config(case), topology, precision)
    result = engine.train_step(local_batches(0, case, topology.data_rank), learning_rate=1e-3)
    assert result.applied
    check_coverage(engine)
    return {extent.kind for extent in engine.snapshot().extents()}


def _cases() -> list[ParameterSet]:
    """Every layout at every level in both types; `make test` takes a third of them in each type."""
    cases = []
    for number, (layout, zero) in enumerate(product(LAYOUTS, (0, 1, 2, 3))):
        for turn, precision in enumerate(("fp32", "bf16")):
            marks = [] if number % 3 == turn else [pytest.mark.stress]
            name = f"world{layout.world}-tp{layout.tensor}-zero{zero}-{precision}"
            name += f"-{layout.freeze}-{layout.num_stages}stages"
            cases.append(pytest.param(replace(layout, zero=zero), precision, marks=marks, id=name))
    return cases


@pytest.mark.parametrize(("case", "precision"), _cases())
def test_the_shares_of_all_ranks_are_the_model(case: Case, precision: Precision) -> None:
    """Every weight and moment is found exactly once, at start and after a step."""
    kinds = set().union(*run_ranks(case.world, _covered, case, precision))
    assert kinds == {"weight", "exp_avg", "exp_avg_sq"}


def _with_a_gap(case: Case) -> None:
    """An engine that does not find one parameter."""
    topology = build_topology(case)
    engine = build_engine(engine_config(case), topology, "fp32")
    find = engine._share.fragments

    def forgetful() -> Iterator[Fragment]:
        return (found for found in find() if found.name != DROPPED)

    engine._share.fragments = forgetful  # type: ignore[method-assign]
    check_coverage(engine)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_parameter_that_is_not_found_stops_the_run(zero: int) -> None:
    """Were DeepSpeed's attributes to mean something else, the run would not start."""
    with pytest.raises(RankFailedError, match=rf"{TrainingError.__name__}.*weight of {DROPPED}"):
        run_ranks(2, _with_a_gap, Case(world=2, zero=zero))


@pytest.mark.parametrize(
    ("zero", "name"), [(1, "single_partition_of_fp32_groups"), (3, "fp32_partitioned_groups_flat")]
)
def test_an_attribute_that_is_gone_is_named(zero: int, name: str) -> None:
    """The error has the attribute, the version, and what to install."""
    adam = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters())
    engine = SimpleNamespace(
        module=torch.nn.Linear(2, 2), optimizer=SimpleNamespace(optimizer=adam)
    )
    fragments = share_of(engine, level=zero, data_rank=0, data_size=1).fragments()
    with pytest.raises(ConfigError) as caught:
        next(fragments)
    assert f"has no {name!r}" in str(caught.value)
    assert "DeepSpeed " in str(caught.value)
    assert f"pip install 'deepspeed{deepspeed_internals.TESTED_VERSIONS}'" in str(caught.value)
