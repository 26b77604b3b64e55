"""Whole runs over data with an odd document: its batch is skipped, rolled back over, or the end."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.training_runs import CONFIG, Outcome, metrics_without_times, run_job

ROOT = Path(__file__).parents[3]
# The order of the data depends on shards and seed alone, so these are the same everywhere. Batch 15
# has a part of the document, too, but then the loss still falls fast.
ODD_BATCHES = (26, 30)
SETTINGS = (
    *("train.steps=30", "run.seed=7", "eval.every_steps=0", "log.interval=1"),
    *("checkpoint.every_steps=12", "train.spike_window=6", "train.spike_sigmas=3"),
)


@pytest.fixture(scope="module")
def odd_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over the same words again and again, and once over nonsense."""
    folder = tmp_path_factory.mktemp("odd")
    texts = ["the same words"] * 480
    texts.insert(192, "".join(random.Random(5).choices(list(map(chr, range(33, 127))), k=47)))
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    subprocess.run(
        [
            *(sys.executable, str(ROOT / "data_prep" / "shard.py"), "--input", str(corpus)),
            *("--output", str(folder / "set"), "--tokenizer", "bytes"),
            *("--validation-fraction", "0", "--workers", "1"),
        ],
        check=True,
        capture_output=True,
    )
    path = folder / "odd.yaml"
    path.write_text(CONFIG.replace("shards: unset", f"shards: {folder / 'set'}"))
    return path


def _run(config: Path, folder: Path, *settings: str) -> tuple[Outcome, Path]:
    folder.mkdir()
    run_dir = folder / "run"
    arguments = [str(config), "--set", f"run.dir={run_dir}", *SETTINGS, *settings]
    return run_job(folder, arguments, world=2), run_dir


def test_a_rollback_is_as_if_the_batches_had_never_been(odd_config: Path, tmp_path: Path) -> None:
    """Twice back to step 24, in one start; then as a run that was told to leave the batches out."""
    outcome, run_dir = _run(odd_config, tmp_path / "rollback", "train.on_spike=rollback")
    assert outcome.codes == [0, 0]
    assert "rolled back from step 26 to step 24: the loss of" in outcome.output[0]
    assert "batches 25 to 26 are left out" in outcome.output[0]
    # Step 28 is on batch 30: batches 27 and later come right after 24 now.
    assert "rolled back from step 28 to step 24: the loss of" in outcome.output[0]
    assert "batches 25 to 30 are left out" in outcome.output[0]
    told, expected_dir = _run(odd_config, tmp_path / "told", "data.skip_batches=[[25,30]]")
    assert told.codes == [0, 0]
    found, expected = metrics_without_times(run_dir), metrics_without_times(expected_dir)
    assert [record.pop("rollbacks", 0) for record in found] == [0] * 24 + [2] * 6
    assert found == expected
    raw = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    (change,) = raw[24]["resume_changes"]
    assert change["now"] == [[25, 26], [25, 30]]


@pytest.mark.stress
def test_a_rollback_after_the_batch_size_changed(odd_config: Path, tmp_path: Path) -> None:
    """Batches since the checkpoint are counted in steps of the size that they had."""
    halves = ("batch.micro_size=2", "train.stop_at_step=44")

    def changed(folder: Path, *settings: str) -> tuple[Outcome, Path]:
        """Twelve steps of eight samples, and then others of four."""
        steps = "train.steps=60"
        first, run_dir = _run(odd_config, folder, steps, "train.stop_at_step=12")
        assert first.codes == [0, 0]
        arguments = [str(odd_config), "--set", f"run.dir={run_dir}", *SETTINGS, steps]
        return run_job(folder, [*arguments, *halves, *settings], world=2), run_dir

    outcome, run_dir = changed(tmp_path / "rollback", "train.on_spike=rollback")
    assert outcome.codes == [0, 0], outcome.output
    assert "a step was 8 samples and is 4 from now on" in outcome.output[0]
    left_out = re.findall(r"batches (\d+) to (\d+) are left out", outcome.output[0])
    assert left_out, outcome.output[0]
    first, last = left_out[-1]
    told, expected_dir = changed(tmp_path / "told", f"data.skip_batches=[[{first},{last}]]")
    assert told.codes == [0, 0], told.output
    found, expected = metrics_without_times(run_dir), metrics_without_times(expected_dir)
    assert found[-1].pop("rollbacks") == len(left_out)
    assert [record.pop("rollbacks", 0) for record in found[:12]] == [0] * 12
    for record in found:
        record.pop("rollbacks", 0)
    assert found == expected


def test_a_skipped_spike_is_counted(odd_config: Path, tmp_path: Path) -> None:
    """Both odd batches are left out, and no other."""
    outcome, run_dir = _run(odd_config, tmp_path / "skip", "train.on_spike=skip")
    assert outcome.codes == [0, 0]
    skipped = [record["step"] for record in metrics_without_times(run_dir) if "skipped" in record]
    assert skipped == list(ODD_BATCHES)
    assert f"(batch {ODD_BATCHES[0]}, samples 200 to 207)" in outcome.output[0]


def test_a_loss_that_stays_infinite_ends_the_rollbacks(odd_config: Path, tmp_path: Path) -> None:
    """The way out is not the data's."""
    settings = ["optimizer.learning_rate=1.0e30", "train.on_nonfinite=rollback"]
    outcome, _ = _run(
        odd_config,
        tmp_path / "infinite",
        *settings,
        *("train.max_rollbacks=2", "checkpoint.every_steps=1"),
    )
    assert outcome.codes == [2, 2]
    assert outcome.output[0].count("rolled back from step") == 2
    assert "after 2 rollbacks, as many as train.max_rollbacks=2 allows" in outcome.errors[0]
