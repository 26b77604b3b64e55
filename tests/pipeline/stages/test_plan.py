"""Plans of pipeline stages: what they may hold, which is balanced, how long its stages wait."""

from itertools import accumulate
from pathlib import Path

import pytest
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, TrainSchedule

from model.config import ModelConfig
from model.structure.part import ModelPart
from pipeline.config.run_config import load_config
from pipeline.stages.costs import (
    StageCost,
    micro_batch_order,
    predicted_idle,
    stage_costs,
    step_time,
)
from pipeline.stages.plan import (
    MAX_STAGES,
    balanced_plan,
    depths,
    layer_equivalents,
    num_depths,
    packed_plan,
    plan_problems,
    plan_text,
    setting_problem,
    stage_plan,
)
from tests.support.hostile import limits

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture
def model() -> ModelConfig:
    """The 7B model: 28 trunk layers, 4 heads, an unembedding worth 0.65 layers."""
    return load_config(CONFIGS / "7b.yaml").model


def test_a_head_weighs_its_layer_and_its_unembedding(model: ModelConfig) -> None:
    """Four heads of the 7B model are about 6.6 layers."""
    assert model.unembedding_layer_equivalents == pytest.approx(0.648, abs=1e-3)
    heads = ModelPart(range(0), range(1, 5))
    assert layer_equivalents(heads, model) == pytest.approx(6.59, abs=0.01)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (1, "[{trunk: 0-27, heads: 1-4}]"),
        (2, "[trunk: 0-16, {trunk: 17-27, heads: 1-4}]"),  # 28 against 6.6 would not do
        (3, "[trunk: 0-13, trunk: 14-27, heads: 1-4]"),
        (5, "[trunk: 0-6, trunk: 7-13, trunk: 14-20, trunk: 21-27, heads: 1-4]"),
    ],
)
def test_balanced_plans_of_the_7b_model(model: ModelConfig, count: int, text: str) -> None:
    """Heads have stages of their own where that balances, and share one where it does not."""
    assert plan_text(balanced_plan(count, model)) == text


@pytest.mark.parametrize("count", range(1, 33))
def test_every_automatic_plan_holds_the_model(model: ModelConfig, count: int) -> None:
    """Any number of stages up to the number of layers: all layers and heads, once, in order."""
    plan = balanced_plan(count, model)
    assert len(plan) == count
    assert [layer for part in plan for layer in part.trunk_layers] == list(range(28))
    assert [head for part in plan for head in part.heads] == [1, 2, 3, 4]
    assert all(part.trunk_layers or part.heads for part in plan)
    assert sum(part.has_embedding for part in plan) == 1
    assert sum(part.owns_lm_head for part in plan) == 1
    setting = tuple(
        {
            kind: f"{numbers[0]}-{numbers[-1]}"
            for kind, numbers in (("trunk", part.trunk_layers), ("heads", part.heads))
            if numbers
        }
        for part in plan
    )
    assert setting_problem(setting) is None
    assert plan_problems(setting, model) == []
    assert stage_plan(setting, model) == plan


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("auto", "write auto:4"),
        ("auto:0", "write auto:4"),
        (0, "at least 1"),
        ((), "no stage"),
        (({"tail": "1-2"},), "'tail', known are trunk and heads"),
        (({"trunk": "5-2"},), "trunk: 5-2, which is not a number or a rising span"),
        (({"trunk": "all"},), "trunk: all"),
        (({"trunk": "0-999999999999"},), "trunk: 0-999999999999, past the 1024 layers"),
        (({"trunk": "9" * 5000},), "which is not a number or a rising span"),
        (({"trunk": "\u0663-\u0664"},), "which is not a number or a rising span"),
        (({"x" * 5000: "1"},), "..., known are trunk and heads"),
        ("auto:" + "9" * 5000, "is not a plan"),
    ],
)
def test_malformed_settings_are_refused(setting: object, words: str) -> None:
    """What is no plan is named, with two that are."""
    problem = setting_problem(setting)  # type: ignore[arg-type]
    assert problem is not None
    assert words in problem
    assert "auto:4" in problem


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (({"trunk": "0-12"}, {"trunk": "14-27"}, {"heads": "1-4"}), "layers 13 are in no stage"),
        (({"trunk": "0-14"}, {"trunk": "14-27"}, {"heads": "1-4"}), "layers 14 are in two stages"),
        (({"trunk": "0-28"}, {"heads": "1-4"}), "layers 28 do not exist (there are 0 to 27)"),
        (({"trunk": "0-27"}, {"heads": "1-3"}), "heads 4 are in no stage"),
        (({"trunk": "0-27"}, {"heads": "0-4"}), "heads 0 do not exist (there are 1 to 4)"),
        (({"trunk": "14-27"}, {"trunk": "0-13"}, {"heads": "1-4"}), "not in rising order"),
        (({"heads": "1-4"}, {"trunk": "0-27"}), "heads read what the whole trunk gives"),
        ("auto:33", "more than the 32 that this model can fill"),
    ],
)
def test_plans_that_do_not_hold_the_model_are_refused(
    model: ModelConfig, setting: object, words: str
) -> None:
    """The message says what is amiss and gives a plan that works."""
    problems = plan_problems(setting, model)  # type: ignore[arg-type]
    assert any(words in problem for problem in problems), problems
    assert all("the balanced plan is [" in p or "use at most auto:32" in p for p in problems)


def _order_of_deepspeed(micro_batches: int, chain: int, depth: int) -> list[tuple[bool, int]]:
    schedule = TrainSchedule(micro_batches=micro_batches, stages=chain, stage_id=depth)
    order: list[tuple[bool, int]] = []
    for command in (command for commands in schedule.steps() for command in commands):
        if isinstance(command, ForwardPass | BackwardPass):
            forward = isinstance(command, ForwardPass)
            order.append((forward, sum(kind == forward for kind, _ in order)))
    return order


def test_the_order_is_that_of_deepspeeds_pipeline() -> None:
    """What training runs and idle times are predicted with is DeepSpeed's 1F1B schedule."""
    for chain in range(2, 6):
        for micro_batches in range(1, 9):
            for depth in range(chain):
                found = micro_batch_order(depth, chain, micro_batches)
                assert found == _order_of_deepspeed(micro_batches, chain, depth)


def test_equal_stages_idle_by_the_formula() -> None:
    """S equal stages and M micro-batches: each idles (S - 1) / (M + S - 1) of a step."""
    for stages, micro_batches in ((2, 1), (2, 8), (4, 4), (4, 32)):
        costs = [StageCost(1 / 3, 0.0, 2 / 3)] * stages
        idle = predicted_idle(costs, list(range(stages)), micro_batches)
        assert idle == pytest.approx([(stages - 1) / (micro_batches + stages - 1)] * stages)


def test_stages_of_heads_work_side_by_side(model: ModelConfig) -> None:
    """Two stages of two heads each are one deep, and end a step sooner than one of four."""
    one = stage_plan(({"trunk": "0-13"}, {"trunk": "14-27"}, {"heads": "1-4"}), model)
    two = stage_plan(
        ({"trunk": "0-13"}, {"trunk": "14-27"}, {"heads": "1-2"}, {"heads": "3-4"}), model
    )
    assert depths(two, model) == [0, 1, 2, 2]
    assert num_depths(one, model) == num_depths(two, model) == 3

    def seconds(plan: tuple[ModelPart, ...]) -> float:
        return step_time(stage_costs(plan, model, recompute=False), depths(plan, model), 4)

    assert seconds(two) < seconds(one)


def _packed_by_trying_every_cut(count: int, model: ModelConfig) -> tuple[int, ...]:
    """The ends of the stages of `packed_plan`, from every cut of every length."""
    weights = [1.0] * model.trunk_layers
    weights += [1 + model.unembedding_layer_equivalents] * model.future_tokens
    sums = [0.0, *accumulate(weights)]
    best: list[tuple[float, tuple[int, ...]]]
    best = [(total, (items,)) for items, total in enumerate(sums)]
    for stage in range(1, count):
        longer = list(best)
        for stop in range(stage + 1, len(sums)):
            longer[stop] = min(
                (max(best[cut][0], sums[stop] - sums[cut]), (*best[cut][1], stop))
                for cut in range(stage, stop)
            )
        best = longer
    return best[-1][1]


@pytest.mark.parametrize("heads", [1, 3, 7])
@pytest.mark.parametrize("vocabulary", [64, 700, 5000])
def test_packed_plans_are_the_best_ones(heads: int, vocabulary: int) -> None:
    """Leaving cuts out that cannot be better changes no plan, of any number of stages."""
    model = ModelConfig(
        layers=14,
        hidden_size=32,
        attention_heads=4,
        vocab_size=vocabulary,
        future_tokens=heads,
        ffn_hidden_size=64,
    )
    for count in range(1, 15):
        plan = packed_plan(count, model)
        ends = tuple(
            part.heads.stop + model.trunk_layers - 1 if part.heads else part.trunk_layers.stop
            for part in plan
        )
        assert ends == _packed_by_trying_every_cut(count, model)


def test_many_micro_batches_are_not_played_through() -> None:
    """Each of those past the first thousand takes as long as the slowest stage."""
    costs = [StageCost(1.0, 0.0, 2.0), StageCost(1.5, 0.25, 2.5), StageCost(0.0, 3.0, 0.0)]
    played = step_time(costs, [0, 1, 2], 1000)
    for more in (24, 25, 3000):
        expected = played + more * costs[1].total
        assert step_time(costs, [0, 1, 2], 1000 + more) == pytest.approx(expected, rel=1e-12)
    with limits(2):
        idle = predicted_idle(costs, [0, 1, 2], 2**31 - 1)
    assert idle[1] == pytest.approx(0, abs=1e-6)


def test_the_largest_plans_take_no_time(model: ModelConfig) -> None:
    """A thousand layers on a hundred stages, and a list that names every layer twice."""
    large = model.model_copy(update={"layers": 1024, "future_tokens": 512})
    with limits(10):
        assert len(balanced_plan(MAX_STAGES, large)) == MAX_STAGES
        assert "more than the 128 stages" in plan_problems(MAX_STAGES + 1, large)[0]
        problems = plan_problems(({"trunk": "0-511"}, {"trunk": "0-511"}), large)
    assert "and 504 more are in two stages" in problems[0]
    assert all(len(problem) < 2000 for problem in problems)
