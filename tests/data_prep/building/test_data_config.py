"""The YAML file of a build: everything the command line can say, and several sources."""

import sysconfig
from pathlib import Path

import pytest

from data_prep.building.data_config import read_config
from data_prep.building.options import BuildOptions, Source
from data_prep.errors import DataError
from data_prep.shard import parse_options

ROOT = Path(__file__).parents[3]


def write(tmp_path: Path, text: str) -> Path:
    """A configuration file."""
    path = tmp_path / "data.yaml"
    path.write_text(text)
    return path


def test_every_option_can_stand_in_the_file(tmp_path: Path) -> None:
    """Types, lists from single words, and sources arrive as the command line's own options."""
    path = write(
        tmp_path,
        """
output: out
tokenizer: bytes
workers: 3
validation_fraction: 0
dedup: exact
glob: "*.md"
sources:
  - {name: a, input: x, weight: 2}
  - {name: b, input: [y, z], weight: 0.5, text_key: body, exclude: [v]}
""",
    )
    assert BuildOptions(**read_config(path)) == BuildOptions(
        output=Path("out"), tokenizer="bytes", workers=3, validation_fraction=0.0, dedup="exact",
        globs=("*.md",),
        sources=(
            Source("a", (Path("x"),), 2.0),
            Source("b", (Path("y"), Path("z")), 0.5, exclude=("v",), text_key="body"),
        ),
    )  # fmt: skip


def test_the_command_line_wins(tmp_path: Path) -> None:
    """A given option replaces the file's; --input replaces its sources."""
    path = write(
        tmp_path,
        "output: out\ntokenizer: bytes\nexclude: [a]\nsources: [{name: s, input: x}]\n",
    )
    options, _ = parse_options(["--config", str(path), "--output", "b", "--exclude", "c"])
    assert (options.output, options.exclude) == (Path("b"), ("c",))
    assert options.all_sources[0].name == "s"
    options, _ = parse_options(["--config", str(path), "--input", "y"])
    assert options.all_sources == (
        Source("corpus", (Path("y"),), globs=(), exclude=("a",), text_key="text"),
    )


def test_paths_are_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Environment variables, patterns in sorted order, and the standard library."""
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).touch()
    monkeypatch.setenv("RAW", str(tmp_path))
    path = write(
        tmp_path,
        "output: ${RAW}/out\ntokenizer: bytes\nsources:\n"
        "  - {name: a, input: '${RAW}/*.jsonl'}\n  - {name: b, input: python:stdlib/json}\n",
    )
    options = BuildOptions(**read_config(path))
    assert options.output == tmp_path / "out"
    first, second = options.all_sources
    assert first.inputs == (tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert second.inputs == (Path(sysconfig.get_path("stdlib")) / "json",)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    """Each with the key, the value and what to do, one line per problem."""
    path = write(
        tmp_path,
        """
outptu: out
workers: many
validation_fraction: true
sources:
  - {name: a, inptu: x, weight: heavy}
  - {name: b, input: "${NOT_SET_ANYWHERE}/x"}
  - {name: c, input: "nowhere/*.jsonl"}
""",
    )
    with pytest.raises(DataError) as caught:
        read_config(path)
    message = str(caught.value)
    for part in (
        "outptu is not a known key; nearest: output",
        "sources[0].inptu is not a known key; nearest: input",
        "sources[0].input is missing",
        'sources[0].weight="heavy"',
        'workers="many"',
        "validation_fraction=true",
        "has no NOT_SET_ANYWHERE",
        "sources[2].input=nowhere/*.jsonl: no file matches",
    ):
        assert part in message
    assert len(message.splitlines()) == 8


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ("[{name: a, input: x}, {name: a, input: y}]", "2 sources are named 'a'"),
        ("[{name: a, input: x, weight: 1}, {name: b, input: y}]", "a with a weight but b without"),
        ("[{name: a, input: x, weight: 0}]", "weight 0 is not a positive number"),
        ("[{name: a/b, input: x}]", "'a/b' is not a folder name"),
    ],
)
def test_sources_must_make_sense(tmp_path: Path, sources: str, message: str) -> None:
    """Names are folders and differ; all sources have a weight or none has."""
    path = write(tmp_path, f"output: out\ntokenizer: bytes\nsources: {sources}\n")
    with pytest.raises(DataError, match=message):
        BuildOptions(**read_config(path)).check()


@pytest.mark.parametrize("text", ["- a\n", "a: [\n", "\xff"])
def test_broken_files_give_one_line(tmp_path: Path, text: str) -> None:
    """What is not a mapping of keys is refused with the path."""
    path = tmp_path / "data.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"--config .*data\.yaml"):
        read_config(path)


def test_numbers_and_keys_are_read_as_in_a_run_configuration(tmp_path: Path) -> None:
    """`5e-4` is a number and `no` is text; of a repeated key the second is named by its line."""
    text = "output: no\ntokenizer: bytes\nvalidation_fraction: 5e-4\n"
    assert read_config(write(tmp_path, text)) == {
        "output": Path("no"),
        "tokenizer": "bytes",
        "validation_fraction": 5e-4,
    }
    with pytest.raises(DataError, match="line 4, column 1: the key 'output' appears twice"):
        read_config(write(tmp_path, text + "output: b\n"))


@pytest.mark.parametrize(
    "value",
    ["!!python/object:os.system x", "[" * 500, '"\\ud800"', '"\\0"', "9" * 400, "&a [*a]", "1e999"],
)
def test_hostile_values_give_one_line(tmp_path: Path, value: str) -> None:
    """The line and column of what cannot be read, and no traceback."""
    with pytest.raises(DataError, match=r"is not valid YAML: line 1, column \d+") as caught:
        read_config(write(tmp_path, f"workers: {value}\n"))
    assert len(str(caught.value).splitlines()) == 1


def test_shipped_files_are_valid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every file of configs/data is read and checked; the quickstart's inputs exist."""
    for folder in ("papers", "web"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.jsonl").touch()
    monkeypatch.setenv("CORPORA", str(tmp_path))
    files = sorted((ROOT / "configs" / "data").glob("*.yaml"))
    assert len(files) == 2
    for path in files:
        options = BuildOptions(**read_config(path))
        options.check()
        assert len(options.all_sources) == 3
    assert all(path.is_dir() for source in options.all_sources for path in source.inputs)
