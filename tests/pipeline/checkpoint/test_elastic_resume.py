"""A checkpoint of any layout goes on in any other, and the curve does not notice.

`make stress` takes every pair of layouts and ZeRO levels; `make test` every fifth of a cycle in
which each layout is left once and entered once at every ZeRO level.
"""

from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.run_config import Precision
from pipeline.engine.build import build_engine
from tests.support.engine_cases import Case, build_topology, engine_config, local_batches
from tests.support.harness import run_ranks
from tests.support.long_forms import part_of
from tests.support.training_runs import metrics_without_times, run_job

BEFORE, AFTER = 2, 10
# fp32 sums in another order.
TOLERANCE = 1e-5
LAYOUTS = {
    "dp1": Case(world=1),
    "dp2": Case(world=2, accumulation=2),
    "dp4": Case(world=4),
    "tp2": Case(world=2, tensor=2),
    "tp2dp2": Case(world=4, tensor=2, accumulation=2),
    "stages2": Case(world=2, accumulation=4, stages="trunk 0-2|heads 1-3"),
    "stages3tp2": Case(
        world=6, tensor=2, accumulation=2, stages="trunk 0-1|trunk 2+heads 1|heads 2-3"
    ),
}
Place = tuple[str, int]  # layout, ZeRO level
PLACES: list[Place] = [(name, zero) for name in LAYOUTS for zero in (1, 2, 3)]


def _case(place: Place, precision: Precision = "fp32") -> Case:
    name, zero = place
    return replace(LAYOUTS[name], zero=zero, precision=precision)


# Each place leads to the one five places on: every layout is left and entered, the stages turn.
CYCLE = [(PLACES[i], PLACES[(i + 5) % len(PLACES)]) for i in range(0, len(PLACES))]
REST = [
    (source, target) for source, target in product(PLACES, PLACES) if (source, target) not in CYCLE
]


def _train(case: Case, load: Path | None, save: Path | None, first: int, last: int) -> list[Any]:
    """Head losses and norms of steps first .. last, between loading and saving."""
    topology = build_topology(case)
    engine = build_engine(engine_config(case), topology, case.precision)
    if load is not None:
        engine.load(load)
    figures = []
    for step in range(first, last):
        result = engine.train_step(
            local_batches(step, case, topology.data_rank), learning_rate=1e-3
        )
        figures.append([*result.head_losses.tolist(), result.grad_norm])
    if save is not None:
        engine.snapshot().write(save)
    return figures


@cache
def _uninterrupted(precision: Precision = "fp32") -> list[Any]:
    case = Case(world=1, zero=0, precision=precision)
    return run_ranks(1, _train, case, None, None, 0, BEFORE + AFTER)[0][BEFORE:]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The state files of a place, made when first asked for."""

    @cache
    def folder(place: Place, precision: Precision = "fp32") -> Path:
        directory = tmp_path_factory.mktemp("state")
        case = _case(place, precision)
        run_ranks(case.world, _train, case, None, directory, 0, BEFORE)
        return directory

    return folder


def _check(source: Path, target: Place) -> None:
    case = _case(target)
    figures = run_ranks(case.world, _train, case, source, None, BEFORE, BEFORE + AFTER)[0]
    for step, expected in zip(figures, _uninterrupted(), strict=True):
        assert step == pytest.approx(expected, rel=TOLERANCE)


def _name(pair: tuple[Place, Place]) -> str:
    return "-to-".join(f"{name}-zero{zero}" for name, zero in pair)


@pytest.mark.parametrize("pair", part_of(CYCLE, lambda number, _: number % 5 == 0), ids=_name)
def test_the_curve_goes_on_in_another_layout(saved: Any, pair: tuple[Place, Place]) -> None:
    """Losses of all heads and the norm over ten steps, as without the change."""
    _check(saved(pair[0]), pair[1])


@pytest.mark.stress
@pytest.mark.parametrize("pair", REST, ids=_name)
def test_the_curve_goes_on_in_every_layout(saved: Any, pair: tuple[Place, Place]) -> None:
    """The same for all other pairs."""
    _check(saved(pair[0]), pair[1])


@pytest.mark.parametrize("pair", part_of(CYCLE, lambda number, _: number == 2), ids=_name)
def test_the_curve_goes_on_in_another_layout_in_bf16(saved: Any, pair: tuple[Place, Place]) -> None:
    """As far from the curve in fp32 as one process in bf16 that was never interrupted.

    The yardstick of each loss, and of the norm, is that process's largest distance in these steps.
    """
    true, alone = _uninterrupted(), _uninterrupted("bf16")
    case = _case(pair[1], "bf16")
    source = saved(pair[0], "bf16")
    found = run_ranks(case.world, _train, case, source, None, BEFORE, BEFORE + AFTER)[0]
    for column in range(len(true[0])):

        def distance(figures: list[Any], column: int = column) -> float:
            pairs = zip(figures, true, strict=True)
            return max(abs(step[column] / wanted[column] - 1) for step, wanted in pairs)

        assert distance(alone) > 0
        assert distance(found) < 3 * distance(alone) + 1e-4


def test_a_run_moves_through_layouts(config: Path, tmp_path: Path) -> None:
    """From the command line: four layouts one after the other write one run's metrics.

    Data position, schedule and checkpoints come along; the log says what changed.
    """
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    arguments = [str(config), "--set", f"run.dir={straight}", "parallel.zero=0"]
    assert run_job(tmp_path, arguments).codes == [0]
    layouts: list[tuple[int, list[str]]] = [
        (2, ["parallel.zero=3", "batch.micro_size=2"]),
        (2, ["parallel.tensor=2", "parallel.zero=1"]),
        (
            6,
            [
                *("parallel.stages=[trunk: 0-1, heads: 1, heads: 2-3]", "parallel.tensor=2"),
                *("parallel.zero=2", "batch.micro_size=2", "batch.accumulation=2"),
            ],
        ),
        (1, ["parallel.zero=0"]),
    ]
    for stop, (world, settings) in zip((3, 5, 8, 12), layouts, strict=True):
        more = [f"run.dir={moved}", f"train.stop_at_step={stop}", *settings]
        outcome = run_job(tmp_path, [str(config), "--set", *more], world=world)
        assert set(outcome.codes) == {0}, outcome.output
        assert (stop == 3) != ("resuming in another layout than saved" in outcome.output[0])
    assert "tensor 2 -> 1" in outcome.output[0]
    records = zip(metrics_without_times(moved), metrics_without_times(straight), strict=True)
    for record, expected in records:
        for key, value in expected.items():
            tolerance = 5e-3 if key == "eval_tokens_per_forward" else TOLERANCE
            assert record[key] == pytest.approx(value, rel=tolerance), key
