"""Every mistake ends with one line that names the value, the rule and what to do."""

import shutil
import socket
from pathlib import Path

import pytest

from tests.support.training_runs import free_port, run_job, start_job

MISTAKES = {
    "unknown key": (["train.stepz=5"], ["train.stepz", "train.steps"]),
    "mistyped value": (["train.steps=many"], ["train.steps", "many"]),
    "heads not fewer than layers": (["model.future_tokens=5"], ["future_tokens=5", "layers=5"]),
    "tensor parallel does not divide": (
        ["model.kv_heads=1", "parallel.tensor=2"],
        ["kv_heads=1", "not divisible", "2"],
    ),
    "world does not divide": (["parallel.tensor=2"], ["parallel.tensor=2", "1 ranks"]),
    "GPU without CUDA": (["train.device=cuda", "train.precision=bf16"], ["train.device=cuda"]),
    "vocabulary too small": (["model.vocab_size=200"], ["model.vocab_size=200", "257"]),
    "fewer tokens than one batch": (["batch.micro_size=100000"], ["fewer than one global batch"]),
    "shards missing": (["data.shards=/nonexistent"], ["/nonexistent", "shard.py"]),
    "tokenizer missing": (["data.tokenizer=/nonexistent.json"], ["/nonexistent.json"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_named(config: Path, tmp_path: Path, mistake: str) -> None:
    """The error is one line with the given words, the exit code is 2, nothing was started."""
    settings, words = MISTAKES[mistake]
    outcome = run_job(tmp_path, [str(config), "--set", *settings])
    assert outcome.codes == [2], outcome.output
    assert len(outcome.errors) == 1, outcome.output
    for word in words:
        assert word in outcome.errors[0]
    assert "Traceback" not in outcome.output[0]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_all_problems_at_once(config: Path, tmp_path: Path) -> None:
    """Three mistakes are reported in one go."""
    settings = ["train.stepz=5", "batch.micro_size=0", "parallel.zero=7"]
    outcome = run_job(tmp_path, [str(config), "--set", *settings])
    assert outcome.codes == [2]
    for word in ("train.stepz", "batch.micro_size", "parallel.zero"):
        assert word in outcome.output[0]


def _copy_of(shards: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    return copy


def test_incomplete_and_corrupt_shards(config: Path, shards: Path, tmp_path: Path) -> None:
    """A missing, a truncated and a flipped shard, and a missing manifest, are each refused."""
    for damage in ("missing", "truncated", "flipped", "no manifest"):
        copy = tmp_path / damage.replace(" ", "_")
        shutil.copytree(shards, copy)
        shard = sorted((copy / "shards" / "train").rglob("*.arrow"))[0]
        if damage == "missing":
            shard.unlink()
        elif damage == "truncated":
            shard.write_bytes(shard.read_bytes()[:-8])
        elif damage == "flipped":
            content = bytearray(shard.read_bytes())
            content[len(content) // 2] ^= 1
            shard.write_bytes(content)
        else:
            (copy / "manifest.json").unlink()
        outcome = run_job(tmp_path, [str(config), "--set", f"data.shards={copy}"])
        assert outcome.codes == [2], (damage, outcome.output)
        assert str(copy) in outcome.errors[0], damage


def test_other_tokenizer(config: Path, shards: Path, tmp_path: Path) -> None:
    """Shards of another tokenizer than data.tokenizer are refused; its own is accepted."""
    other = tmp_path / "tokenizer.json"
    other.write_text((shards / "tokenizer.json").read_text() + " ")
    outcome = run_job(tmp_path, [str(config), "--set", f"data.tokenizer={other}"])
    assert outcome.codes == [2]
    assert "another tokenizer" in outcome.errors[0]
    own = shards / "tokenizer.json"
    settings = [f"data.tokenizer={own}", "train.stop_at_step=1"]
    assert run_job(tmp_path, [str(config), "--set", *settings]).codes == [0]


def test_checkpoint_of_another_model(config: Path, tmp_path: Path) -> None:
    """Resuming with other sizes, another seed or other data is refused, with both values."""
    assert run_job(tmp_path, [str(config), "--set", "train.stop_at_step=3"]).codes == [0]
    for setting, words in (
        ("model.hidden_size=64", ["model.hidden_size", "32", "64"]),
        ("run.seed=8", ["run.seed", "7", "8"]),
        ("data.sequence_length=8", ["data.sequence_length", "16", "8"]),
    ):
        outcome = run_job(tmp_path, [str(config), "--set", setting])
        assert outcome.codes == [2], outcome.output
        assert all(word in outcome.errors[0] for word in [*words, "--resume none"])


def test_checkpoint_path_that_is_none(config: Path, tmp_path: Path) -> None:
    """A path without a checkpoint is named, with what one looks like."""
    outcome = run_job(tmp_path, [str(config), "--resume", str(tmp_path / "nothing")])
    assert outcome.codes == [2]
    assert "nothing is not a checkpoint" in outcome.errors[0]


def test_port_taken(config: Path, tmp_path: Path) -> None:
    """A rendezvous port that something else holds is named with a remedy."""
    port = free_port()
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", port))
        holder.listen()
        variables = {"MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        job = start_job(tmp_path, [str(config)], world=1, environment=variables)
        outcome = job.finish()
    assert outcome.codes == [2], outcome.output
    assert f"MASTER_PORT={port}" in outcome.errors[0]
    assert "another MASTER_PORT" in outcome.errors[0]
