"""Copies of code and configuration that jobs run, whatever becomes of the originals."""

import os
import subprocess
from pathlib import Path

import pytest

from pipeline.config.run_config import load_config
from pipeline.launching.snapshot import SUBMISSIONS, job_script, take_snapshot
from pipeline.submit import main


@pytest.fixture(autouse=True)
def no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the job script's variables none is set."""
    monkeypatch.delenv("ARGS", raising=False)


def test_a_snapshot_runs_by_itself(config: Path, tmp_path: Path) -> None:
    """Code that is imported from it is its own, from any folder; the configuration is resolved."""
    run = load_config(config, ["train.steps=77"])
    first, second = take_snapshot(run), take_snapshot(run)
    assert first.folder == tmp_path / "run" / SUBMISSIONS / "0001"
    assert second.folder.name == "0002"
    assert load_config(first.config) == run
    assert first.script.read_bytes() == job_script().read_bytes()
    code = first.folder / "code"
    shown = subprocess.run(
        [code / ".venv" / "bin" / "python", "-c", "import pipeline; print(pipeline.__file__)"],
        cwd=Path(__file__).parents[3],
        env=os.environ | {"PYTHONPATH": str(code), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == str(code / "pipeline" / "__init__.py")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "train.stepz=5"], "train.stepz"),
        (["--set", "data.shards=/nonexistent"], "/nonexistent"),
        (["--set", "parallel.tensor=2", "--nodes", "1", "--ranks-per-node", "3"], "3 ranks"),
        (["--", "--time=5"], "is not above the 300 s of --signal"),
    ],
)
def test_mistakes_are_found_before_the_queue(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    """One line, status 2, and nothing was copied."""
    assert main([str(config), *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert words in lines[0]
    assert not (tmp_path / "run" / SUBMISSIONS).exists()


def test_arguments_in_the_environment_are_refused(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The job script would add them to a run that was checked without them."""
    monkeypatch.setenv("ARGS", "-k resume")
    assert main([str(config), "--print"]) == 2
    assert "ARGS=-k resume is set" in capsys.readouterr().err
    monkeypatch.setenv("ARGS", " ")
    assert main([str(config), "--print"]) == 0


def test_print_shows_the_command_and_does_nothing(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What can be typed by hand."""
    assert main([str(config), "--nodes", "2", "--print", "--", "--partition=gpu"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("sbatch --job-name=tiny ")
    assert "--nodes=2 --partition=gpu" in shown
    assert not (tmp_path / "run" / SUBMISSIONS).exists()
