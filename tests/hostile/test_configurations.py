"""Configurations of any content: a dry run describes the run, or ends with one clear error."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import strategies as st

from pipeline.config.run_config import known_keys
from pipeline.train import main
from tests.support.hostile import Ended, call_command, check_ended, fuzzed, untouched

ROOT = Path(__file__).parents[2]
SECTIONS = {
    "run": {"name": "small", "dir": "runs/small"},
    "model": {
        "layers": "6",
        "hidden_size": "64",
        "attention_heads": "4",
        "vocab_size": "96",
        "future_tokens": "4",
    },
    "data": {"shards": "somewhere", "sequence_length": "32"},
    "batch": {"micro_size": "2"},
    "train": {"steps": "100", "device": "cpu"},
    "optimizer": {"learning_rate": "3e-4"},
    "schedule": {"warmup_steps": "10"},
}
# YAML texts of values, each of a kind that broke something once, or might.
VALUES = (
    *("9" * 400, "-" + "9" * 400, "9" * 5000, "1e999", "1e308", "-1e308", "1e-320", ".inf", ".nan"),
    *(str(1 << 63), str((1 << 64) - 1), str((1 << 63) - 1), str(-(1 << 63)), "1000000000000"),
    *("0", "-1", "1", "2", "5", "64", "0.5", "1.5", "true", "null", "''", "nope", "auto", "cuda"),
    *('"a\\0b"', '"a\\nb"', '"\\e[2J"', '"\\ud800"', '"\\u2028"', "x" * 5000, "a/" * 3000),
    *("!!int abc", "!!python/object:os.system x", "&a [*a]", "*nothing", "[" * 100 + "]" * 100),
    *("[" * 50_000, "{a: {a: {a: 1}}}", "[]", "{}", "[1, 2, 3]", "[[1, 2], [2, 3]]", "[[5, 1]]"),
    *("[{trunk: 0-999999999999}]", "[{trunk: 0-1}, {heads: 1-4}]", "auto:" + "9" * 9, "auto:3"),
    *("[{trunk: '" + "9" * 5000 + "'}]", "[{step: 0, weights: {a: 1}}]", "{a: 1e308, b: 1e308}"),
    *("{'\\x1b': 1}", '{"a\\nb": 1}', "[[1, 9223372036854775808]]", "[" + "[1, 1], " * 3000 + "]"),
    *("/dev/zero", "/etc/passwd", "/", "../../..", "~", "[1e308, 1e308, 1, 1]", "-0.0", "fp32"),
    *("{rope_type: linear, factor: 1e308}", "{rope_type: [], factor: 8}", "2001-01-01", "0x10"),
)
TEXTS = st.sampled_from(VALUES) | st.text(max_size=20) | st.integers().map(str)
KEYS = st.sampled_from([key for key in known_keys() if not key.startswith("train.init_from")])
FRACTIONS = {
    *("model.rope_theta", "model.norm_eps", "model.init_std", "model.embedding_init_std"),
    *("optimizer.learning_rate", "optimizer.eps", "optimizer.weight_decay"),
    "optimizer.gradient_clipping",
}
STRANGE_KEYS = st.sampled_from(["train.stepz", "x", "'a\\nb'.c", "x" * 5000, "run.'", "model.{"])


def yaml_of(changes: dict[str, str], end: str) -> str:
    """The text of the small configuration with other values, and something at its end."""
    sections = {name: dict(values) for name, values in SECTIONS.items()}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    lines = []
    for name, values in sections.items():
        lines += [f"{name}:", *(f"  {key}: {value}" for key, value in values.items())]
    return "\n".join(lines) + f"\n{end}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration; a first dry run has imported what is slow to import."""
    folder = tmp_path_factory.mktemp("configurations")
    (folder / "run.yaml").write_text(yaml_of({}, ""))
    assert main([str(folder / "run.yaml"), "--dry-run"]) == 0
    return folder


def dry_run(folder: Path, *arguments: str) -> Ended:
    """`python -m pipeline.train run.yaml --dry-run ...`, which changes nothing."""
    with untouched(folder):
        return call_command(main, [str(folder / "run.yaml"), "--dry-run", *arguments])


@fuzzed(
    120,
    changes=st.dictionaries(KEYS | STRANGE_KEYS, TEXTS, min_size=1, max_size=3),
    end=st.sampled_from(["", "", "", "\x00", "\ud800", "- 1", "run: {name: twice}", "log: 5", "!"]),
)
def test_any_file(folder: Path, changes: dict[str, str], end: str) -> None:
    """Values, keys and ends of a file that are hostile, alone and together."""
    content = yaml_of(changes, end).encode("utf-8", "surrogatepass")
    (folder / "run.yaml").write_bytes(content)
    dry_run(folder)


@fuzzed(
    80,
    settings=st.lists(
        st.tuples(KEYS | STRANGE_KEYS, TEXTS).map("=".join) | st.text(max_size=10),
        min_size=1,
        max_size=3,
    ),
    ranks=st.sampled_from(["1", "8", "0", "-1", "9" * 30, "1048576"]) | st.integers().map(str),
)
def test_any_options(folder: Path, settings: list[str], ranks: str) -> None:
    """The same values by --set, and any number of ranks."""
    (folder / "run.yaml").write_text(yaml_of({}, ""))
    given = [text for text in settings if not text.startswith("-")]
    dry_run(folder, *(["--set", *given] if given else []), f"--world-size={ranks}")


@fuzzed(20, content=st.binary(max_size=200))
def test_any_bytes(folder: Path, content: bytes) -> None:
    """A file that is no configuration at all."""
    (folder / "run.yaml").write_bytes(content)
    assert dry_run(folder).code == 2


@pytest.mark.parametrize("setting", [f"{key}={'9' * 400}" for key in known_keys()])
def test_numbers_of_400_digits(folder: Path, setting: str) -> None:
    """In every key, one line and exit code 2."""
    (folder / "run.yaml").write_text(yaml_of({}, ""))
    ended = dry_run(folder, "--set", setting)
    assert ended.code == 2
    assert len(ended.errors.splitlines()) == 1


@pytest.mark.parametrize("value", [str(1 << 63), str((1 << 64) - 1), "-.inf", ".nan"])
def test_numbers_that_no_key_can_hold(folder: Path, value: str) -> None:
    """Past int64, infinite and not a number: no key takes them, but a fraction is of any size."""
    (folder / "run.yaml").write_text(yaml_of({}, ""))
    for key in known_keys():
        ended = dry_run(folder, "--set", f"{key}={value}")
        assert ended.code == 2 or (key in FRACTIONS and value.isdecimal()), (key, value)
        assert ended.code == 0 or key in ended.errors


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.init_from=" + "x" * 5000, "longer than a path"),
        ("run.dir=" + "x/" * 4000, "longer than a path"),
        ("run.name=" + "x" * 256, "cannot be a folder name"),
        ('run.name="a\\tb"', "holds a control character"),
        ('run.dir="a\\0b"', "not text"),
        ('data.shards="a\\e[2Jb"', "not text"),
        ('data.tokenizer="a\\nb"', "holds a control character"),
        ('log.wandb_project="a\\u2028b"', "holds a control character"),
        ('data.weights={"a\\nb": 1}', "holds a control character"),
        ("data.eval_split=nope", "use one of: train or validation"),
        ("data.train_split=nope", "use one of: train or validation"),
        ("train.heartbeat_timeout_s=0.5", "must be at least 5"),
        ("train.timeout_s=1e308", "must be at most 31536000"),
        ("train.timeout_s=1e-300", "must be at least 1"),
        ("data.skip_batches=[[1, 9223372036854775808]]", "must be at most 9223372036854775807"),
        ("parallel.stages=[{trunk: 0-999999999999}]", "past the 1024 layers"),
        ("model.layers=1000000000000", "must be at most 1024"),
        ("model.vocab_size=4000000000", "must be at most 16777216"),
        ("train.steps=1e308", "is a decimal number, must be a whole number"),
    ],
)
def test_nonsense_is_named(folder: Path, setting: str, words: str) -> None:
    """What was once accepted, hung or ended in a traceback is refused with its rule."""
    (folder / "run.yaml").write_text(yaml_of({}, ""))
    ended = dry_run(folder, "--set", setting)
    assert ended.code == 2
    assert words in ended.errors
    assert len(ended.errors.splitlines()) == 1


@pytest.mark.parametrize("ranks", ["0", "-1", "1048577", "9" * 1000, "nope"])
def test_worlds_that_are_none(folder: Path, ranks: str) -> None:
    """--world-size takes numbers of ranks only."""
    (folder / "run.yaml").write_text(yaml_of({}, ""))
    assert dry_run(folder, f"--world-size={ranks}").code == 2


def test_thousands_of_problems_are_cut_short(folder: Path) -> None:
    """A file of unknown keys is refused at once, with the first of them."""
    keys = "".join(f"  key_{number}: 1\n" for number in range(30_000))
    (folder / "run.yaml").write_text(yaml_of({}, "") + "log:\n" + keys)
    ended = dry_run(folder)
    assert ended.code == 2
    assert len(ended.errors.splitlines()) == 51


@pytest.mark.parametrize(
    ("setting", "variables"),
    [
        (b"run.name=\xff\xfe", {}),
        (b"train.steps=1", {"RANK": "x", "WORLD_SIZE": "2"}),
    ],
)
def test_the_command_itself(
    folder: Path, setting: bytes, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of a command line that are no text, and variables of no job."""
    (folder / "run.yaml").write_text(yaml_of({}, ""))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-m", "pipeline.train", str(folder / "run.yaml"), "--dry-run"]
    done = subprocess.run(
        [*command, "--set", setting], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    check_ended(Ended(done.returncode, done.stdout, done.stderr))
