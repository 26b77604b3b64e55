"""The data section: weights, schedules of weights, and ranges of batches to skip."""

from pathlib import Path

import pytest

from model.errors import ConfigError
from pipeline.config.run_config import load_config, to_yaml


def test_weights_of_sources_are_a_mapping_or_a_schedule(small: Path) -> None:
    """The short form is a schedule of one phase; both survive the resolved file."""
    config = load_config(small, ["data.weights={web: 3, code: 1}"])
    assert [(s.step, s.weights) for s in config.data.weight_phases] == [(0, {"web": 3, "code": 1})]
    schedule = "[{step: 0, weights: {web: 1}}, {step: 9, weights: {web: 0.5, code: 0.5}}]"
    config = load_config(small, [f"data.weight_schedule={schedule}", "data.skip_batches=[[3, 4]]"])
    assert [phase.step for phase in config.data.weight_phases] == [0, 9]
    assert config.data.skip_batches == ((3, 4),)
    small.write_text(to_yaml(config))
    assert load_config(small) == config
    assert load_config(small, ["data.weight_schedule=[]"]).data.weight_phases == ()


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["data.weights={a: 0}"], ['data.weights={"a": 0.0}', "above 0"]),
        (["data.weights={}"], ["data.weights={}", "above 0"]),
        (["data.weights={a: -1}"], ["data.weights.a=-1", "at least 0"]),
        (
            ["data.weights={a: 1}", "data.weight_schedule=[{step: 0, weights: {a: 1}}]"],
            ["data.weight_schedule and data.weights are both given"],
        ),
        (
            ["data.weight_schedule=[{step: 5, weights: {a: 1}}]"],
            ["starts at step 5", "must have step: 0"],
        ),
        (
            ["data.weight_schedule=[{step: 0, weights: {a: 1}}, {step: 0, weights: {a: 2}}]"],
            ["step 0 after step 0", "in the order"],
        ),
        (["data.weight_schedule=[{step: 0, weights: {a: 0}}]"], ["weight_schedule[0].weights"]),
        (["data.skip_batches=[[5, 4]]"], ["[5, 4]", "first <= last"]),
        (["data.skip_batches=[[0, 4]]"], ["[0, 4]", "1 <= first"]),
        (["data.skip_batches=[[7, 9], [3, 7]]"], ["[3, 7] and [7, 9]", "join them"]),
        (["data.skip_batches=[[1]]"], ["data.skip_batches[0][1] is missing"]),
        (["data.packing=best"], ["data.packing", "concat, best_fit or one_per_sequence"]),
    ],
)
def test_impossible_mixtures_and_ranges_are_refused(
    small: Path, overrides: list[str], parts: list[str]
) -> None:
    """Each broken rule of the data section is one line with its value and what to do."""
    with pytest.raises(ConfigError) as caught:
        load_config(small, overrides)
    (line,) = str(caught.value).splitlines()
    assert all(part in line for part in parts), line
