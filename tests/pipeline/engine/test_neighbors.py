"""`parallel.zero_hpz_partition_size`: neighbors keep a copy of the weights and gather from it."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from deepspeed.runtime.zero import partition_parameters

from pipeline.config.run_config import world_problems
from pipeline.engine.build import build_engine
from tests.support.engine_cases import Case, build_topology, engine_config, local_batches
from tests.support.harness import run_ranks

ALL = Case(world=4, zero=3, accumulation=2)
NEIGHBORS = Case(world=4, zero=3, accumulation=2, neighbors=2)


def _gathers_of_a_step(case: Case) -> dict[int, int]:
    """Elements of weights gathered in a step, by among how many ranks."""
    gather, counts = partition_parameters._dist_allgather_fn, Counter[int]()

    def counted(mine: Any, whole: Any, group: Any = None) -> Any:
        counts[dist.get_world_size(group)] += whole.numel()
        return gather(mine, whole, group)

    topology = build_topology(case)
    engine = build_engine(engine_config(case), topology, "fp32")
    engine.train_step(local_batches(0, case, topology.data_rank), learning_rate=1e-3)
    partition_parameters._dist_allgather_fn = counted
    engine.train_step(local_batches(1, case, topology.data_rank), learning_rate=1e-3)
    partition_parameters._dist_allgather_fn = gather
    return dict(counts)


def test_only_a_steps_first_micro_batch_gathers_from_all_ranks() -> None:
    """Weights of this size are gathered once a micro-batch; the second's stay among two ranks."""
    everywhere = run_ranks(4, _gathers_of_a_step, ALL)
    near = run_ranks(4, _gathers_of_a_step, NEIGHBORS)
    for before, after in zip(everywhere, near, strict=True):
        assert after == {4: before[4] / 2, 2: before[4] / 2}


def _losses_around_a_load(case: Case, folder: Path) -> list[float]:
    """Of an evaluation of fresh weights, then of the same weights after three steps and a load."""
    topology = build_topology(case)
    engine = build_engine(engine_config(case), topology, "fp32")
    batches = local_batches(9, case, topology.data_rank)
    fresh = engine.evaluate(batches).head_losses
    engine.snapshot().write(folder)
    dist.barrier()
    for step in range(3):
        engine.train_step(local_batches(step, case, topology.data_rank), learning_rate=1e-2)
    trained = engine.evaluate(batches).head_losses
    engine.load(folder)
    loaded = engine.evaluate(batches).head_losses
    assert loaded == fresh
    assert trained != fresh
    return [*fresh, *trained]


@pytest.mark.parametrize("freeze", ["none", pytest.param("trunk", marks=pytest.mark.stress)])
def test_the_copy_does_not_outlive_a_load(tmp_path: Path, freeze: str) -> None:
    """It was made from the weights before; those that are frozen keep theirs from step to step."""
    found = []
    for neighbors in (1, 2):
        folder = tmp_path / str(neighbors)
        folder.mkdir()
        case = Case(world=2, zero=3, neighbors=neighbors, freeze=freeze)
        found.append(run_ranks(2, _losses_around_a_load, case, folder)[0])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_the_neighbors_divide_the_data_parallel_ranks() -> None:
    """The message names the value, the ranks, and what would do."""
    config = engine_config(Case(world=2, zero=3, neighbors=2))
    assert world_problems(config, 4) == []
    (problem,) = world_problems(config, 3)
    assert problem.startswith("parallel.zero_hpz_partition_size=2 does not divide the 3 data-")


@pytest.mark.parametrize(("zero", "stages"), [(1, "1"), (3, "trunk 0-2|trunk 3-5+heads 1-3")])
def test_only_zero_3_with_one_stage_keeps_a_copy(zero: int, stages: str) -> None:
    """Elsewhere there is nothing to gather, or stages would wait for each other."""
    case = Case(world=2, zero=zero, stages=stages, neighbors=2)
    with pytest.raises(ValueError, match="zero_hpz_partition_size=2 is for ZeRO-3 with one stage"):
        engine_config(case)
