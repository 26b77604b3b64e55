"""The command that evaluates a model: what it prints and writes, and what it refuses."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from foundation.command_line import EXIT_USER_ERROR
from pipeline.evaluate import main
from tests.support.tiny_export import export_tiny


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four heads that write bytes."""
    folder = tmp_path_factory.mktemp("evaluate") / "export"
    export_tiny(folder)
    return folder


def _problems(folder: Path) -> Path:
    path = folder / "problems.jsonl"
    value = {
        "task_id": "T/0",
        "prompt": "# ",
        "entry_point": "print",
        "test": "def check(f):\n    assert 2 > 1\n",
    }
    path.write_text(json.dumps(value) + "\n")
    return path


def test_everything_at_once(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tables of text by kind, pass@k, and the same figures as JSON; every completion is kept."""
    text = tmp_path / "notes.jsonl"
    lines = [{"text": "some words " * 9, "source": kind} for kind in ("a", "b", "a")]
    text.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = [
        *(str(export), "--text", str(text), "--prompts", "2", "--prompt-tokens", "8"),
        *("--new-tokens", "8", "--stride", "32"),
        *("--problems", str(_problems(tmp_path)), "--samples", "3", "--k", "1,3"),
        *("--max-new-tokens", "8", "--time-limit", "60", "--allow-unsandboxed"),
        *("--json", str(tmp_path / "f.json"), "--results", str(tmp_path / "s.jsonl")),
    ]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    figures = json.loads((tmp_path / "f.json").read_text())
    held_out = figures["held_out"]
    assert list(held_out["kinds"]) == ["a", "b"]
    assert held_out["kinds"]["a"]["documents"] == 2
    assert (held_out["window"], held_out["stride"]) == (64, 32)
    assert f"{held_out['all']['losses'][3]:.4f}" in said
    assert f"{held_out['kinds']['b']['bits_per_byte'][0]:.4f}" in said
    assert f"{figures['decoding']['a']['tokens_per_forward']:.2f}" in said
    samples = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [sample["task_id"] for sample in samples] == ["T/0"] * 3
    assert all(sample.keys() == {"task_id", "completion", "passed", "reason"} for sample in samples)
    share = sum(sample["passed"] for sample in samples) / 3
    assert figures["pass_at_k"]["estimates"]["1"] == pytest.approx(share)
    assert f"pass@1    {share:8.2%}" in said


def test_shards_are_kinds_by_source(
    export: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The set's own tokenizer has other ids, which is said; nothing is guessed."""
    assert main([str(export), "--data", str(shards)]) == EXIT_USER_ERROR
    assert "another tokenizer" in capsys.readouterr().err
    assert main([str(export), "--data", str(shards), "--split", "held"]) == EXIT_USER_ERROR
    assert "has no split 'held'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "x", "--window", "0"], "--window 0 must be at least 1"),
        (["--text", "TEXT", "--window", "8", "--stride", "9"], "--stride 9 is more than the"),
        (["--text", "TEXT", "--prompts", "-1"], "--prompts -1 must be at least 0"),
        (["--text", "x", "--seed", "-1"], "--seed -1 must be from 0"),
        (["--text", "TEXT", "TEXT"], "is given twice"),
        (["--text", "EMPTY"], "nothing can be predicted"),
        (["--text", "absent.txt"], "--text absent.txt: No such file"),
        (["--text", "TEXT", "--json", "FOLDER"], "is a folder; give the name of a file"),
        (["--problems", "PROBLEMS", "--k", "1,2"], "--k 1,2 must be from 1 to --samples 1"),
        (["--problems", "PROBLEMS", "--k", "one"], "--k one is no list of numbers"),
        (["--problems", "PROBLEMS", "--k", "0"], "--k 0 must be from 1"),
        (["--problems", "PROBLEMS", "--heads", "5"], "--heads 5, but this model has 4"),
        (["--problems", "PROBLEMS", "--time-limit", "0"], "--time-limit 0 must be from 0.1"),
        (["--problems", "PROBLEMS", "--temperature", "-1"], "--temperature -1 must be 0 or"),
        (["--problems", "PROBLEMS", "--temperature", "0", "--samples", "2"], "same completion 2"),
        (["--problems", "PROBLEMS", "--top-p", "0"], "--top-p 0 must be above 0"),
        (["--problems", "TEXT"], "line 1 is not JSON"),
        (["--problems", "PROBLEMS", "--shots", "3"], "--shots 3 takes task 2 of MBPP"),
        (["--problems", "PROBLEMS", "--shots", "-1"], "--shots -1 must be from 0 to"),
    ],
)
def test_options_are_refused_in_one_line(
    arguments: list[str],
    message: str,
    export: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the value, the rule and what to give instead."""
    (tmp_path / "text.txt").write_text("some words")
    (tmp_path / "empty.txt").write_text("")
    places = {
        "TEXT": tmp_path / "text.txt",
        "EMPTY": tmp_path / "empty.txt",
        "FOLDER": tmp_path,
        "PROBLEMS": _problems(tmp_path),
    }
    given = [str(places.get(argument, argument)) for argument in arguments]
    assert main([str(export), "--time-limit", "60", *given]) == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_a_model_with_a_memory_decodes_without_drafts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has losses of every head, and completions, but nothing that heads would save."""
    export_tiny(tmp_path / "export", memory={"segment": 6})
    (tmp_path / "text.txt").write_text("some words " * 30)
    arguments = [
        *(str(tmp_path / "export"), "--text", str(tmp_path / "text.txt"), "--window", "300"),
        *("--problems", str(_problems(tmp_path)), "--max-new-tokens", "2"),
        *("--time-limit", "60", "--allow-unsandboxed", "--json", str(tmp_path / "f.json")),
    ]
    assert main(arguments) == 0
    figures = json.loads((tmp_path / "f.json").read_text())
    assert len(figures["held_out"]["all"]["losses"]) == 4
    assert figures["decoding"] == {}
    assert figures["pass_at_k"]["samples"] == 1
    capsys.readouterr()
    assert main([*arguments, "--heads", "2"]) == EXIT_USER_ERROR
    assert "a model with a memory decodes without them" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["metrics.jsonl", "state.json", "latest"])
def test_a_run_is_to_be_exported_first(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run, its checkpoints and one of them are no model yet."""
    (tmp_path / name).write_text("")
    assert main([str(tmp_path), "--text", "x"]) == EXIT_USER_ERROR
    assert f"python -m pipeline.export {tmp_path} EXPORT" in capsys.readouterr().err


def test_a_folder_without_a_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As is a path that is no folder."""
    for folder in (tmp_path, tmp_path / "absent"):
        assert main([str(folder), "--text", "x"]) == EXIT_USER_ERROR
        assert capsys.readouterr().err.startswith("error: ")


def test_something_has_to_be_asked_for(export: Path) -> None:
    """A usage error, as for every required argument."""
    with pytest.raises(SystemExit) as stop:
        main([str(export)])
    assert stop.value.code == 2


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_the_harness_is_an_extra(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without it, the message says how to get it."""
    assert main([str(export), "--lm-eval", "arc_easy"]) == EXIT_USER_ERROR
    assert "pip install -e '.[evaluate]'" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_the_harness_runs_a_task_of_ones_own(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The example task, from the root of the checkout as its page says."""
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    figures: dict[str, Any]
    arguments = ["--lm-eval", "headway_example", "--include-path", "examples/lm_eval"]
    assert main([str(export), *arguments, "--json", str(tmp_path / "f.json")]) == 0
    figures = json.loads((tmp_path / "f.json").read_text())
    assert 0 <= figures["lm_eval"]["headway_example"]["acc"] <= 1
