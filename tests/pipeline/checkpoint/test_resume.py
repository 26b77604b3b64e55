"""A run that was killed or stopped continues as if nothing had happened, to the last bit."""

import json
import random
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_prep.shards.shard_set import ShardSet
from pipeline.checkpoint.file_names import WEIGHTS
from pipeline.checkpoint.files import checkpoint_path
from pipeline.checkpoint.folder import read_config
from pipeline.checkpoint.sharded_tensors import read_weights
from pipeline.config.changes import config_changes
from pipeline.config.run_config import known_keys, load_config
from pipeline.reporting.metrics import read_metrics
from tests.support.long_forms import part_of
from tests.support.training_runs import (
    last_step,
    metrics_without_times,
    run_job,
    start_job,
)

_BF16 = "train.precision=bf16"
LAYOUTS = {
    "one": (1, ["parallel.zero=0"]),
    "dp2-zero3": (2, ["parallel.zero=3", "batch.micro_size=2"]),
    "dp2-zero1-acc2": (2, ["parallel.zero=1", "batch.micro_size=1", "batch.accumulation=2"]),
    "tp2-zero2": (2, ["parallel.zero=2", "parallel.tensor=2"]),
    "dp2-zero0-bf16": (2, ["parallel.zero=0", "batch.micro_size=2", _BF16]),
    "dp2-zero1-bf16-acc2": (
        2,
        ["parallel.zero=1", "batch.micro_size=1", "batch.accumulation=2", _BF16],
    ),
    "tp2-zero2-bf16": (2, ["parallel.zero=2", "parallel.tensor=2", _BF16]),
    "dp2-zero3-bf16": (2, ["parallel.zero=3", "batch.micro_size=2", _BF16]),
    "dp2-zero3-causal-replicated": (
        2,
        ["batch.micro_size=2", "model.head_kind=causal", "model.lm_head=replicated"],
    ),
    "stages3-zero1-anticausal": (
        3,
        [
            *("parallel.zero=1", "model.head_kind=anticausal"),
            "parallel.stages=[{trunk: 0-1}, {heads: 2-3}, {heads: 1}]",
        ],
    ),
}


def _weights(run_dir: Path) -> dict[str, Tensor]:
    checkpoint = checkpoint_path(run_dir)
    return dict(read_weights(checkpoint / WEIGHTS, read_config(checkpoint).model))


def _assert_same_run(straight: Path, resumed: Path) -> None:
    assert metrics_without_times(resumed) == metrics_without_times(straight)
    expected = _weights(straight)
    for name, weight in _weights(resumed).items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize(
    "layout",
    part_of(LAYOUTS, lambda _, name: name == "dp2-zero3"),
)
def test_killed_twice_equals_uninterrupted(config: Path, tmp_path: Path, layout: str) -> None:
    """SIGKILL of all ranks at two random moments: metrics and weights are bit-identical."""
    world, settings = LAYOUTS[layout]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    outcome = run_job(
        tmp_path, [str(config), "--set", f"run.dir={straight}", *settings], world=world
    )
    assert outcome.codes == [0] * world, outcome.output
    arguments = [str(config), "--set", f"run.dir={killed}", *settings]
    moments = random.Random(layout)
    for low, high in ((3, 6), (7, 11)):
        job = start_job(tmp_path, arguments, world=world)
        step = moments.randint(low, high)
        job.wait_until(lambda step=step: last_step(killed) >= step)  # type: ignore[misc]
        for rank in range(world):
            job.kill(rank)
        assert all(code != 0 for code in job.finish().codes)
    outcome = run_job(tmp_path, arguments, world=world)
    assert outcome.codes == [0] * world, outcome.output
    assert "resumed from" in outcome.output[0]
    _assert_same_run(straight, killed)


def test_epoch_border(config: Path, shards: Path, tmp_path: Path) -> None:
    """Stopping and resuming around the end of an epoch repeats and loses no sample."""
    tokens = ShardSet.open(shards, "train").num_tokens
    settings = ["data.sequence_length=512", "batch.micro_size=16", "eval.every_steps=0"]
    settings += ["model.future_tokens=1", "model.layers=2"]
    border = tokens // 512 // 16  # the step in which the second epoch begins, less one
    settings += [f"train.steps={border + 3}"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    base = [str(config), "--set", *settings]
    assert run_job(tmp_path, [*base, f"run.dir={straight}"]).codes == [0]
    for stop in (border, border + 1, border + 3):
        arguments = [*base, f"run.dir={stopped}", f"train.stop_at_step={stop}"]
        assert run_job(tmp_path, arguments).codes == [0]
    _assert_same_run(straight, stopped)


def test_signal_stops_all_ranks_at_one_step(config: Path, tmp_path: Path) -> None:
    """SIGTERM to one rank: all save the same step and exit 75; the run then goes on exactly."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    settings = ["train.steps=40", "checkpoint.every_steps=5"]  # one may be in flight
    arguments = [str(config), "--set", *settings, f"run.dir={stopped}"]
    variables = {"TORCHELASTIC_RUN_ID": "none"}  # as torchrun sets it
    job = start_job(tmp_path, arguments, world=2, environment=variables)
    job.wait_until(lambda: last_step(stopped) >= 5)
    job.kill(1, signal.SIGTERM)
    outcome = job.finish()
    assert outcome.codes == [75, 75], outcome.output
    assert "stopped by SIGTERM" in outcome.output[0]
    last_line = outcome.output[0].splitlines()[-1]
    assert "this is a clean stop and the run is saved; torchrun" in last_line
    assert "exit code 75" in last_line
    assert 5 <= last_step(stopped) < 40
    assert run_job(tmp_path, arguments, world=2).codes == [0, 0]
    base = [str(config), "--set", *settings, f"run.dir={straight}"]
    assert run_job(tmp_path, base, world=2).codes == [0, 0]
    _assert_same_run(straight, stopped)


def test_resume_reports_the_position(config: Path, tmp_path: Path) -> None:
    """Resuming prints step, tokens and next sample."""
    run_dir = tmp_path / "run"
    assert run_job(tmp_path, [str(config), "--set", "train.stop_at_step=4"]).codes == [0]
    outcome = run_job(tmp_path, [str(config), "--set", "train.stop_at_step=5"])
    assert outcome.codes == [0]
    # 4 steps of 4 samples of 16 tokens.
    assert f"resumed from {run_dir}/checkpoints/step_00000004" in outcome.output[0]
    assert "step 4, tokens 256, next sample 16" in outcome.output[0]


def test_resume_none_keeps_the_earlier_run(config: Path, tmp_path: Path) -> None:
    """A new start in the same folder moves the earlier files aside; nothing is lost."""
    run_dir = tmp_path / "run"
    assert run_job(tmp_path, [str(config), "--set", "train.stop_at_step=4"]).codes == [0]
    before = (run_dir / "metrics.jsonl").read_text()
    arguments = [str(config), "--resume", "none", "--set", "train.stop_at_step=2"]
    outcome = run_job(tmp_path, arguments)
    assert outcome.codes == [0]
    assert "new run: step 0" in outcome.output[0]
    assert last_step(run_dir) == 2
    assert (run_dir / "previous_1" / "metrics.jsonl").read_text() == before
    assert (run_dir / "previous_1" / "checkpoints" / "step_00000004" / "state.json").exists()


def test_damaged_checkpoint_is_passed_over(config: Path, tmp_path: Path) -> None:
    """A flipped bit in the newest checkpoint: auto says so and takes the one before it."""
    checkpoints = tmp_path / "run" / "checkpoints"
    assert run_job(tmp_path, [str(config), "--set", "train.stop_at_step=6"]).codes == [0]
    victim = next((checkpoints / "step_00000006" / WEIGHTS).rglob("*.safetensors"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    outcome = run_job(tmp_path, [str(config), "--set", "train.stop_at_step=7"])
    assert outcome.codes == [0], outcome.output
    assert "passing over" in outcome.output[0]
    assert victim.name in outcome.output[0]
    assert "step_00000003: step 3" in outcome.output[0]
    named = [str(config), "--resume", str(checkpoints / "step_00000006")]
    (checkpoints / "step_00000006" / "state.json").unlink()
    outcome = run_job(tmp_path, named)
    assert outcome.codes == [2]
    assert "state.json is missing" in outcome.errors[0]
    assert "--resume auto" in outcome.errors[0]


def test_partial_folders_never_count(config: Path, tmp_path: Path) -> None:
    """A folder that was being written when the run died is neither resumed from nor kept."""
    checkpoints = tmp_path / "run" / "checkpoints"
    assert run_job(tmp_path, [str(config), "--set", "train.stop_at_step=3"]).codes == [0]
    whole = checkpoints / "step_00000003"
    partial = checkpoints / "step_00000006.partial"
    whole.rename(partial)
    (checkpoints / "latest").unlink()
    outcome = run_job(tmp_path, [str(config), "--set", "train.stop_at_step=6"])
    assert outcome.codes == [0]
    assert "new run: step 0" in outcome.output[0]
    assert last_step(tmp_path / "run" / "previous_1") == 3
    assert sorted(p.name for p in checkpoints.iterdir()) == [
        "latest",
        "step_00000003",
        "step_00000006",
    ]


def test_keeps_the_newest(config: Path, tmp_path: Path) -> None:
    """After the run the newest `checkpoint.keep` are there, and latest names the last."""
    assert run_job(tmp_path, [str(config)]).codes == [0]
    checkpoints = tmp_path / "run" / "checkpoints"
    names = sorted(path.name for path in checkpoints.glob("step_*"))
    assert names == ["step_00000009", "step_00000012"]
    assert (checkpoints / "latest").read_text().strip() == "step_00000012"


@pytest.mark.stress
def test_going_back_takes_another_way(config: Path, tmp_path: Path) -> None:
    """Resuming from an older checkpoint sets the newer ones aside; retention never eats the new."""
    run_dir = tmp_path / "run"
    checkpoints = run_dir / "checkpoints"
    assert run_job(tmp_path, [str(config)]).codes == [0]
    older = checkpoints / "step_00000009"
    arguments = [str(config), "--resume", str(older), "--set"]
    # Nothing is saved when there is nothing to train; latest must already name what is there.
    assert run_job(tmp_path, [*arguments, "train.stop_at_step=9"]).codes == [0]
    assert checkpoint_path(run_dir) == older
    assert run_job(tmp_path, [*arguments, "train.stop_at_step=10"]).codes == [0]
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == [
        "latest",
        "step_00000009",
        "step_00000010",
        "superseded_step_00000012",
    ]
    assert (checkpoints / "latest").read_text().strip() == "step_00000010"
    assert [record["step"] for record in metrics_without_times(run_dir)] == list(range(1, 11))


def test_all_checkpoints_damaged_is_no_new_start(config: Path, tmp_path: Path) -> None:
    """When no checkpoint is whole, auto stops with an error and leaves the metrics alone."""
    run_dir = tmp_path / "run"
    assert run_job(tmp_path, [str(config), "--set", "train.stop_at_step=6"]).codes == [0]
    before = (run_dir / "metrics.jsonl").read_text()
    for manifest in run_dir.glob("checkpoints/step_*/manifest.json"):
        manifest.unlink()
    outcome = run_job(tmp_path, [str(config)])
    assert outcome.codes == [2]
    assert "all 2 checkpoints" in outcome.errors[0]
    assert "--resume none" in outcome.errors[0]
    assert (run_dir / "metrics.jsonl").read_text() == before


@pytest.mark.stress
def test_optimizer_settings_of_the_resumed_run_hold(config: Path, tmp_path: Path) -> None:
    """A weight decay that was changed for the resumed part is applied, not the saved one."""
    weights = []
    for decay in ("0.1", "10.0"):
        run_dir = tmp_path / f"decay_{decay}"
        base = [str(config), "--set", f"run.dir={run_dir}"]
        assert run_job(tmp_path, [*base, "train.stop_at_step=4"]).codes == [0]
        arguments = [*base, f"optimizer.weight_decay={decay}", "train.stop_at_step=8"]
        assert run_job(tmp_path, arguments).codes == [0]
        weights.append(_weights(run_dir))
    name = "heads.readout.weight"
    assert weights[1][name].norm() < 0.99 * weights[0][name].norm()
    norm = "heads.readout.norm_weight"  # not decayed, before or after
    assert torch.allclose(weights[0][norm], weights[1][norm], atol=0.02)


@pytest.mark.parametrize(
    "gone",
    [
        "folder",
        *(pytest.param(g, marks=pytest.mark.stress) for g in ("behind a link", "checkpoint")),
    ],
)
def test_lost_checkpoints_do_not_start_a_run_over(config: Path, tmp_path: Path, gone: str) -> None:
    """Metrics without the checkpoints that belong to them: refused, and nothing is erased.

    `--resume none` then begins anew, with the earlier files moved aside.
    """
    run_dir, stop = tmp_path / "run", ["--set", "train.stop_at_step=3"]
    checkpoints = run_dir / "checkpoints"
    assert run_job(tmp_path, [str(config), *stop]).codes == [0]
    before = (run_dir / "metrics.jsonl").read_bytes()
    if gone == "checkpoint":
        (checkpoints / "step_00000003").rename(tmp_path / "elsewhere")
        words = "names 'step_00000003', but"
    else:
        checkpoints.rename(tmp_path / "elsewhere")
        words = "is missing; bring it back"
    if gone == "behind a link":
        checkpoints.symlink_to("../scratch")
        words = "is a link to ../scratch, which does not exist"
    outcome = run_job(tmp_path, [str(config)])
    assert outcome.codes == [2]
    assert words in outcome.errors[0]
    assert "--resume none" in outcome.errors[0]
    assert (run_dir / "metrics.jsonl").read_bytes() == before
    assert run_job(tmp_path, [str(config), "--resume", "none", *stop]).codes == [0]
    assert (run_dir / "previous_1" / "metrics.jsonl").read_bytes() == before
    assert checkpoint_path(run_dir) == checkpoints / "step_00000003"


def test_a_renamed_checkpoint_is_not_resumed_from(config: Path, tmp_path: Path) -> None:
    """A folder whose state is of another step than its name: passed over, refused when named.

    The run that resumed from it would set it aside as one past its own step.
    """
    checkpoints = tmp_path / "run" / "checkpoints"
    assert run_job(tmp_path, [str(config), "--set", "train.stop_at_step=6"]).codes == [0]
    renamed = checkpoints / "step_00000009"
    (checkpoints / "step_00000006").rename(renamed)
    outcome = run_job(tmp_path, [str(config), "--resume", str(renamed)])
    assert outcome.codes == [2]
    assert "state.json says step 6, so it was renamed" in outcome.errors[0]
    (checkpoints / "step_00000003").rename(checkpoints / "step_00000001")
    outcome = run_job(tmp_path, [str(config)])
    assert outcome.codes == [2]
    assert "passing over" in outcome.output[0]
    assert "state.json says step 3" in outcome.output[0]
    assert sorted(path.name for path in checkpoints.glob("step_*")) == [
        "step_00000001",
        "step_00000009",
    ]


def test_a_resume_says_what_changed(config: Path, tmp_path: Path) -> None:
    """Key, then, now and effect of each change: in the log, and in the first record after it."""
    first = [str(config), "--set", "train.stop_at_step=3"]
    assert run_job(tmp_path, first).codes == [0]
    settings = ["train.stop_at_step=5", "optimizer.learning_rate=1e-3", "train.steps=20"]
    settings += ["optimizer.betas=[0.8, 0.95]", "model.head_weights=[1, 0.5, 0.5]"]
    outcome = run_job(tmp_path, [str(config), "--set", *settings])
    assert outcome.codes == [0], outcome.output
    lines = outcome.output[0].splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith("key "))
    assert lines[head].split() == ["key", "then", "now", "effect"]
    rows = {line.split()[0]: line for line in lines[head + 1 : head + 6]}
    assert "0.003" in rows["optimizer.learning_rate"]
    assert "0.001" in rows["optimizer.learning_rate"]
    assert "the learning rate of every later step" in rows["optimizer.learning_rate"]
    path = tmp_path / "run" / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["step"] for record in records if "resume_changes" in record] == [4]
    changes = {change["key"]: change for change in records[3]["resume_changes"]}
    assert changes.keys() == rows.keys()
    assert set(changes) == {setting.partition("=")[0] for setting in settings}
    assert (changes["train.steps"]["then"], changes["train.steps"]["now"]) == (12, 20)
    assert "resume_changes" not in read_metrics(tmp_path / "run")[3]
    outcome = run_job(tmp_path, [str(config), "--set", "train.steps=4"])
    assert outcome.codes == [2]
    assert "train.steps=4 is below step 5" in outcome.errors[0]


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
def test_every_key_has_an_effect(config: Path) -> None:
    """No key can change without a word on what that does."""
    run = load_config(config)
    for key in known_keys():
        section, _, name = key.partition(".")
        other = getattr(run, section).model_copy(update={name: "other"})
        found = config_changes(run, run.model_copy(update={section: other}))
        assert [change.key for change in found] == [key]
        assert found[0].effect
