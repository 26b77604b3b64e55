"""`pipeline.train --check`: what keeps a run from training, without starting it."""

from pathlib import Path

import pytest

from pipeline.checkpoint.resume_point import model_problems
from pipeline.config.run_config import load_config
from tests.support.training_runs import run_job

MISTAKES = {
    "world": (["parallel.tensor=2"], ["--world-size", "3"], "parallel.tensor=2"),
    "too few samples": (["batch.micro_size=100000"], [], "fewer than one global batch"),
    "shards": (["data.shards=/nonexistent"], [], "/nonexistent"),
    "folder": (["run.dir=/proc/run"], [], "run.dir=/proc/run cannot be made"),
}


def test_a_sound_run_is_told_its_folder(config: Path, tmp_path: Path) -> None:
    """The last line is run.dir, for scripts; nothing else is there afterwards."""
    outcome = run_job(tmp_path, [str(config), "--check", "--world-size", "4"])
    assert outcome.codes == [0], outcome.output
    assert outcome.output[0].splitlines()[-1] == str(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(config: Path, tmp_path: Path, mistake: str) -> None:
    """The error is that of the start, its status 2."""
    settings, arguments, words = MISTAKES[mistake]
    command = [str(config), "--check", *arguments, "--set", *settings]
    outcome = run_job(tmp_path, command)
    assert outcome.codes == [2], outcome.output
    assert len(outcome.errors) == 1
    assert words in outcome.errors[0]


def test_a_checkpoint_of_another_model_is_refused(config: Path, tmp_path: Path) -> None:
    """Before a job waits for nodes to find out."""
    assert run_job(tmp_path, [str(config), "--set", "train.steps=3"]).codes == [0]
    command = [str(config), "--check", "--set", "model.ffn_hidden_size=32"]
    outcome = run_job(tmp_path, command)
    assert outcome.codes == [2]
    assert "model.ffn_hidden_size: saved with 64, this run has 32" in outcome.errors[0]
    assert run_job(tmp_path, [*command, "--resume", "none"]).codes == [0]


def test_of_a_memory_the_key_that_differs_is_told(config: Path) -> None:
    """Not all of its keys as they were and as they are."""
    data = ["data.sequence_length=64"]
    before, after, without = (
        load_config(config, [*data, f"model.memory={memory}"])
        for memory in ("{segment: 8, bptt: 1}", "{segment: 8, bptt: 2}", "null")
    )
    assert model_problems(before, after) == ["model.memory.bptt: saved with 1, this run has 2"]
    assert len(model_problems(before, without)) == 1
    assert len(model_problems(without, after)) == 1
