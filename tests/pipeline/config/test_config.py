"""Run configuration: files, overrides, every problem at once, and what depends on the machine."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from model.errors import ConfigError
from model.operations.rope_scaling import RopeScaling
from pipeline.config.run_config import (
    RunConfig,
    data_parallel_size,
    known_keys,
    load_config,
    to_yaml,
)
from tests.pipeline.config.conftest import SMALL, refusal

CONFIGS = Path(__file__).parents[3] / "configs"


def test_defaults_fill_what_the_file_leaves_out(small: Path) -> None:
    """Sections and keys that are not written have their documented defaults."""
    config = load_config(small)
    assert config.run.dir == Path("runs/small")
    assert config.run.seed == 1234
    assert config.model.kv_heads == 4
    assert (config.parallel.tensor, config.parallel.zero, config.parallel.stages) == (1, 3, 1)
    assert config.optimizer.betas == (0.9, 0.95)
    assert (config.train.precision, config.train.device) == ("auto", "auto")
    assert (config.checkpoint.every_steps, config.checkpoint.keep) == (0, 2)
    assert config.eval.every_steps == 0


@pytest.mark.parametrize("text", ["3e-4", "3E-4", "0.0003", "3.0e-04", "300_000e-9"])
def test_numbers_are_read_as_people_write_them(small: Path, text: str) -> None:
    """`3e-4` is a number, in the file and in an override."""
    small.write_text(SMALL.replace("3e-4", text))
    assert load_config(small).optimizer.learning_rate == pytest.approx(3e-4)
    assert load_config(small, [f"optimizer.eps={text}"]).optimizer.eps == pytest.approx(3e-4)


def test_grouped_digits_are_one_number(small: Path) -> None:
    """1_000_000 is a million."""
    assert load_config(small, ["train.steps=1_000_000"]).train.steps == 1_000_000


def test_overrides_reach_every_kind_of_value_and_the_later_wins(small: Path) -> None:
    """Scalars, lists, null, absent sections; the last of two for one key counts."""
    config = load_config(
        small,
        [
            "train.steps=50",
            "optimizer.betas=[0.8, 0.99]",
            "log.progress=false",
            "train.stop_at_step=null",
            "run.name=again",
            "train.steps=70",
            "log.wandb_project=a=b",
        ],
    )
    assert config.train.steps == 70
    assert config.optimizer.betas == (0.8, 0.99)
    assert config.log.progress is False
    assert config.run.dir == Path("runs/again")
    assert config.log.wandb_project == "a=b"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.steps", ['--set "train.steps"', "section.key=value"]),
        ("=5", ["section.key=value"]),
        ("train.stps=5", ["--set train.stps", "nearest: train.steps"]),
        ("micro_size=4", ["nearest: batch.micro_size"]),
        ("model.sequence_length=4", ["nearest: data.sequence_length"]),
        ("train.steps=[", ["--set train.steps=[", "not valid YAML"]),
        ("train.steps={a: 1}", ["one by one"]),
        ("log.quux=1", ["log.quux", "log has: log.interval"]),
        ("train.steps=", ["train.steps=null is empty", "must be a whole number"]),
    ],
)
def test_malformed_overrides_are_refused(small: Path, override: str, parts: list[str]) -> None:
    """One line that names the override and what to do."""
    lines = refusal(small, override)
    assert len(lines) == 1
    assert all(part in lines[0] for part in parts), lines[0]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ('train.steps="12"', 'train.steps="12" is text, must be a whole number; write 12 without'),
        ("train.steps=true", "train.steps=true is true/false, must be a whole number"),
        ("train.steps=1e6", "train.steps=1000000.0 is a decimal number, must be a whole number"),
        ("train.steps=yes", 'train.steps="yes" is text'),
        ("train.steps=[1]", "train.steps=[1] is a list"),
        ("train.steps=0", "train.steps=0 must be more than 0"),
        ("optimizer.learning_rate=true", "is true/false, must be a number"),
        ("optimizer.learning_rate=.nan", "is not finite"),
        ("optimizer.betas=[0.9]", "optimizer.betas[1] is missing: the list is too short"),
        ("optimizer.betas=[0.9, 0.9, 0.9]", "has 3 values, must have 2"),
        ("optimizer.betas=0.9", "optimizer.betas=0.9 is a decimal number, must be a list"),
        ("optimizer.betas=[0.9, 1.0]", "below 1"),
        ("log.progress=1", "log.progress=1 is a whole number, must be true or false"),
        ("run.name=7", "run.name=7 is a whole number, must be text; put it in quotes"),
        ("run.name=a/b", "cannot be a folder name"),
        ("data.shards=5", "data.shards=5 is a whole number, must be a path as text"),
        ("parallel.zero=4", "parallel.zero=4 must be at most 3"),
        ("train.device=gpu", "use one of: auto, cpu or cuda"),
    ],
)
def test_wrong_types_are_named_in_plain_words(small: Path, override: str, expected: str) -> None:
    """The key, the value as written, and what it must be; nothing is converted silently."""
    lines = refusal(small, override)
    assert len(lines) == 1
    assert expected in lines[0], lines[0]
    assert "pydantic" not in lines[0]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.stop_at_step=101", ["stop_at_step=101", "train.steps=100", "at most 100"]),
        ("schedule.kind=wsd", ["schedule.decay_steps is missing"]),
        ("schedule.decay_steps=5", ["no effect", "kind=cosine", "wsd"]),
        ("checkpoint.keep=1", ["keep=1", "deleted only after a new one has been verified"]),
        ("parallel.stages=auto", ["stages='auto'", "is not a plan", "auto:4"]),
        (
            "parallel.stages=[trunk: 0-2, heads: 1-4]",
            ["layers 2 do not exist", "the balanced plan is [trunk: 0-1"],
        ),
        ("data.sequence_length=4", ["sequence_length=4", "future_tokens=4", "at least 5"]),
        ("model.layers=4", ["model.future_tokens=4", "model.layers=4", "at least 5"]),
    ],
)
def test_broken_rules_name_value_rule_and_way_out(
    small: Path, override: str, parts: list[str]
) -> None:
    """Each rule between keys is one line that starts with the dotted key."""
    lines = refusal(small, override)
    assert len(lines) == 1
    assert lines[0].split("=")[0].split(" ")[0] in known_keys()
    assert all(part in lines[0] for part in parts), lines[0]


def test_wsd_phases_must_fit_into_the_run(small: Path) -> None:
    """Warm-up and decay together are at most train.steps."""
    wsd = ("schedule.kind=wsd", "schedule.decay_steps=90")
    assert load_config(small, wsd).schedule.decay_steps == 90
    lines = refusal(small, *wsd, "schedule.warmup_steps=11")
    assert len(lines) == 1
    assert "lower decay_steps to at most 89" in lines[0]


def test_sizes_not_divisible_by_tensor_parallel(small: Path) -> None:
    """Every size that 3 does not divide is listed, with the sizes that would work."""
    lines = refusal(small, "parallel.tensor=3", "model.ffn_hidden_size=200")
    assert [line.split("=")[0] for line in lines] == [
        "model.attention_heads",
        "model.kv_heads",
        "model.ffn_hidden_size",
    ]
    assert all("set parallel.tensor to 1 or 2" in line for line in lines)
    assert "nearest: 198 or 201" in lines[2]


def test_all_problems_of_file_and_overrides_come_at_once(small: Path) -> None:
    """Unknown keys, missing keys, wrong types and broken rules are reported together."""
    text = SMALL.replace("hidden_size", "hiden_size").replace("{micro_size: 2}", "{micro_size: x}")
    small.write_text(text + "optimiser: {}\ncheckpoint: {keep: 0}\neval: 3\n")
    lines = refusal(small, "train.stps=3", "train.stop_at_step=200")
    expected = [
        "--set train.stps is not a known key; nearest: train.steps",
        "optimiser is not a known key; nearest: optimizer",
        "model.hidden_size is missing",
        "model.hiden_size is not a known key; nearest: model.hidden_size",
        'batch.micro_size="x" is text',
        "train.stop_at_step=200 is past train.steps=100",
        "eval=3 is a whole number, must be a mapping of keys",
        "checkpoint.keep=0 must be at least 2",
    ]
    assert len(lines) == len(expected)
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True)), lines


def test_a_wrong_value_does_not_hide_the_other_problems_of_its_section(small: Path) -> None:
    """Rules of a section are checked also when another key of it is at fault."""
    lines = refusal(
        small,
        "run.seed=-1",
        "run.name=.hidden",
        "train.precision=half",
        "train.stop_at_step=101",
        "model.norm_eps=x",
        "model.attention_heads=5",
        "model.future_tokens=6",
    )
    assert [line.split("=")[0] for line in lines] == [
        "run.name",
        "run.seed",
        "model.hidden_size",
        "model.future_tokens",
        "model.norm_eps",
        "train.stop_at_step",
        "train.precision",
    ]


def test_keys_that_are_not_text_are_unknown_keys(small: Path) -> None:
    """A number as a key is refused like any unknown key."""
    small.write_text(SMALL.replace("{micro_size: 2}", "{micro_size: 2, 3: 4}") + "5: 6\n")
    first, second = refusal(small)
    assert first.startswith("5 is not a known key")
    assert second.startswith("batch.3 is not a known key")


def test_missing_section_lists_the_keys_it_needs(small: Path) -> None:
    """A section that is absent is reported by its required keys."""
    small.write_text(SMALL.replace("train: {steps: 100}\n", ""))
    assert refusal(small)[0].startswith("train.steps is missing and has no default")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "is empty"),
        (b"# nothing\n", "is empty"),
        (b"- 1\n", "is not a mapping of sections"),
        (b"run: {name: a}\nmodel: [1\n", "is not valid YAML: line 3"),
        (b"run:\n  name: a\n  name: b\n", "line 3, column 3: the key 'name' appears twice"),
        (b"run: \xff\xfe\n", "line 1, column 6: byte 0xff is not UTF-8"),
    ],
)
def test_unreadable_files_are_refused(tmp_path: Path, content: bytes, part: str) -> None:
    """Empty, wrong shape, broken or repeated YAML, and bytes that are no text: one line each."""
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert part in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    """A path that is not there, or is a folder, is named."""
    with pytest.raises(ConfigError, match=r"none\.yaml does not exist"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


def test_resolved_yaml_loads_back_to_an_equal_configuration(small: Path, tmp_path: Path) -> None:
    """to_yaml writes every key, and reading it changes nothing, awkward text included."""
    awkward = ['run.name="1e-5"', 'data.tokenizer="null"', 'log.wandb_project="012"']
    config = load_config(small, [*awkward, "optimizer.eps=1e-12", "model.head_weights=[1,1,0,2]"])
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(config))
    again = load_config(resolved)
    assert again == config
    assert to_yaml(again) == to_yaml(config)
    assert again.run.name == "1e-5"


def test_configuration_built_in_python_obeys_the_same_rules(small: Path) -> None:
    """Rules between sections also hold without a file; values are frozen."""
    values = load_config(small).model_dump(mode="json")
    assert RunConfig.model_validate(values) == load_config(small)
    values["data"]["sequence_length"] = 4
    with pytest.raises(ValidationError, match=r"must be greater than model\.future_tokens"):
        RunConfig.model_validate(values)
    config = load_config(small)
    with pytest.raises(ValidationError, match="frozen"):
        config.train.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "world_size", "tokens"),
    [
        ("quickstart", 2, 16 * 128),
        ("300m", 8, 8 << 20),
        ("1b", 8, 8 << 20),
        ("7b", 64, 8 << 20),
        ("13b", 128, 8 << 20),
        ("llama-3.2-1b-heads", 8, 1 << 20),
    ],
)
def test_shipped_configurations(name: str, world_size: int, tokens: int) -> None:
    """Each loads, names its hardware and world size first, and has the step its comment states."""
    path = CONFIGS / f"{name}.yaml"
    first = path.read_text().splitlines()[0]
    assert first.startswith("# For ")
    assert f"world size {world_size}" in first
    config = load_config(path)
    assert config.model.future_tokens == 4
    assert config.tokens_per_step(data_parallel_size(config, world_size)) == tokens


def test_rope_scaling_is_one_value(small: Path) -> None:
    """It is set as a whole, survives the resolved YAML, and a parameter too many is named."""
    setting = "model.rope_scaling={rope_type: linear, factor: 2}"
    config = load_config(small, [setting])
    assert config.model.rope_scaling == RopeScaling(rope_type="linear", factor=2.0)
    small.write_text(to_yaml(config))
    assert load_config(small) == config
    (line,) = refusal(small, setting.replace("}", ", beta: 3}"))
    assert line.startswith("model.rope_scaling.beta is not a known key")
    (line,) = refusal(small, setting.replace(", factor: 2", ""))
    assert line.startswith("model.rope_scaling.factor is missing")


@pytest.mark.parametrize("version", ["0", "true", "newest", "1.5"])
def test_a_version_is_a_number(small: Path, version: str) -> None:
    """Whatever else stands there is refused with what to do."""
    small.write_text(f"version: {version}\n" + small.read_text())
    with pytest.raises(ConfigError, match="is not the version of a configuration; leave it out"):
        load_config(small)
