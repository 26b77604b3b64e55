"""Reference pages say something of every key and every argument, and name every one."""

import argparse
import re

import pytest

from data_prep.building.options import BuildOptions
from docs.extensions.commands import MODULES, parser_of, refusal
from docs.extensions.config_keys import keys_of, sections, unit, words
from docs.extensions.docstrings import attribute_descriptions
from docs.extensions.markdown import table
from pipeline.config.run_config import RunConfig
from tests.support.page_blocks import ROOT

REFERENCE = ROOT / "docs" / "reference"
# Numbers that count nothing: shares, rates, exponents, seeds, levels.
WITHOUT_UNIT = {
    "run.seed",
    "model.rope_theta",
    "model.norm_eps",
    "model.init_std",
    "model.embedding_init_std",
    "model.head_weights",
    "data.weights",
    "data.skip_batches",
    "parallel.zero",
    "optimizer.learning_rate",
    "optimizer.betas",
    "optimizer.eps",
    "optimizer.weight_decay",
    "optimizer.gradient_clipping",
    "schedule.final_ratio",
    "rope_scaling.factor",
    "rope_scaling.low_freq_factor",
    "rope_scaling.high_freq_factor",
    "weight_schedule.weights",
    "build.validation_fraction",
    "build.max_bad_fraction",
    "source.weight",
}


@pytest.mark.parametrize("section", sections())
def test_every_key_is_described(section: str) -> None:
    """Type, default and meaning; and a unit, where the value is a number that counts something."""
    keys = keys_of(section)
    assert keys
    for key in keys:
        name = f"{section}.{key.name}"
        assert key.kind, name
        assert key.default, name
        assert len(key.description) >= 10, f"{name} has no description in its class's docstring"
        if "number" in key.kind:
            assert bool(key.unit) != (name in WITHOUT_UNIT), f"{name}: unit {key.unit!r}"


def test_the_pages_have_every_section() -> None:
    """A new section of a run gets its table."""
    text = (REFERENCE / "config.md").read_text() + (REFERENCE / "data_config.md").read_text()
    shown = re.findall(r"^```\{config-keys\} (\w+)$", text, re.MULTILINE)
    assert sorted(shown) == sorted(sections())
    assert set(RunConfig.model_fields) < set(shown)


def test_types_are_put_into_words() -> None:
    """Bounds, choices, lists and null."""
    kinds = {
        f"{name}.{key.name}": key
        for name in ("train", "optimizer", "data", "run")
        for key in keys_of(name)
    }
    assert kinds["train.steps"].kind == "whole number > 0, or null"
    assert kinds["train.stop_at_step"].kind == "whole number > 0, or null"
    freezes = "`none` or `trunk` or `early_exit` or `all_but_memory`"
    assert kinds["train.freeze"].kind == freezes
    assert kinds["optimizer.betas"].kind == "[number, number]"
    assert kinds["optimizer.betas"].default == "`[0.9,0.95]`"
    assert kinds["data.weights"].kind == "mapping of text to number ≥ 0, or null"
    assert kinds["run.seed"].kind == "whole number ≥ 0, < 2^32"
    assert kinds["data.shards"].default == "required"
    assert words(tuple[int, ...], ()) == "list of whole numbers"
    assert unit("train.timeout_s", float) == "seconds"
    assert unit("train.timeout_s", str) == ""


def test_descriptions_may_take_several_lines() -> None:
    """Continued lines belong to their key, and the next section ends the list."""
    described = attribute_descriptions(BuildOptions)
    assert described["special_tokens"].endswith("or rejects the document.")
    assert "sources" in described


@pytest.mark.parametrize("command", MODULES)
def test_every_argument_has_help(command: str) -> None:
    """An option without words is a guess."""
    silent = [
        action.dest
        for action in parser_of(command)._actions
        if not action.help and action.help != argparse.SUPPRESS
    ]
    assert silent == []


def test_the_page_has_every_command() -> None:
    """A new command gets its table and an example that is run or says why not."""
    text = (REFERENCE / "commands.md").read_text()
    shown = re.findall(r"^```\{command\} ([\w.]+)$", text, re.MULTILINE)
    assert sorted(shown) == sorted(MODULES)
    mains = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in ("data_prep", "model", "pipeline")
        for path in (ROOT / package).rglob("*.py")
        if re.search(
            r"^if __name__ == .__main__.:\n(?!    # Run by)", path.read_text(), re.MULTILINE
        )
    }
    assert mains - {"pipeline.commands"} == set(MODULES)  # which calls the others


def test_arguments_are_refused_as_the_command_refuses_them() -> None:
    """An option that does not exist, and one that does."""
    assert "--no-such-option" in (refusal("pipeline.train", ["x.yaml", "--no-such-option"]) or "")
    assert refusal("pipeline.train", ["x.yaml", "--set", "a.b=1"]) is None


def test_cells_of_a_table_are_escaped() -> None:
    """A vertical bar in a cell is no border."""
    assert table(["a"], [["x|y\nz"]]) == ["| a |", "| --- |", "| x\\|y z |"]
