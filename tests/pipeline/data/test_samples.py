"""Runs on mixtures, packed and masked documents, with batches to skip: from the command line."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import shard
from pipeline.checkpoint.train_state import read_state
from tests.support.training_runs import metrics_without_times, run_job

SCHEDULE = "[{step: 0, weights: {prose: 1, code: 1}}, {step: 4, weights: {prose: 1, code: 7}}]"


def make_set(folder: Path, count: int, prose: str = "", code: str = "") -> Path:
    """A set of two sources, as bytes; each with more keys of its own if given."""
    for name, word in (("prose", "word"), ("code", "def ")):
        lines = [
            json.dumps({"text": f"{number} " + word * (1 + number * 7 % 13)})
            for number in range(count)
        ]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    file = folder / "set.yaml"
    file.write_text(
        f"{{output: {folder / 'set'}, tokenizer: bytes, validation_fraction: 0.2, sources: ["
        f"{{name: prose, input: {folder / 'prose.jsonl'} {prose}}},"
        f"{{name: code, input: {folder / 'code.jsonl'} {code}}}]}}"
    )
    assert shard.main(["--config", str(file), "--workers", "1"]) == 0
    return folder / "set"


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prose and code."""
    return make_set(tmp_path_factory.mktemp("mixed"), 120)


def train(
    config: Path, run_dir: Path, settings: Sequence[str], *, world: int = 1
) -> list[dict[str, Any]]:
    """Train, and give the metrics."""
    outcome = run_job(
        run_dir.parent, [str(config), "--set", f"run.dir={run_dir}", *settings], world=world
    )
    assert set(outcome.codes) == {0}, outcome.output
    return metrics_without_times(run_dir)


@pytest.mark.stress
def test_a_review_goes_over_all_sources_alike_and_says_so(config: Path, tmp_path: Path) -> None:
    """Whatever weights the shards bring along: these are of no effect."""
    weighted = make_set(tmp_path / "weighted", 12, prose=", weight: 9", code=", weight: 1")
    settings = [f"data.shards={weighted}", "train.steps=null", "eval.every_steps=0"]
    settings += ["data.review={phases: [{name: all}]}", "parallel.zero=0", "log.interval=100"]
    train(config, tmp_path / "run", settings)
    log = (tmp_path / "run" / "logs" / "rank_00000.log").read_text()
    assert "no effect     weights of the shards: data.review goes over all alike" in log
    sizes = re.search(r"in an epoch of each source: prose (\d+), code (\d+)", log)
    assert sizes is not None
    losses = np.load(tmp_path / "run" / "review" / "losses_epoch_01.npy")
    assert len(losses) == int(sizes[1]) + int(sizes[2])
    assert (losses > 0).all()


def test_a_scheduled_mixture_resumes_exactly(config: Path, mixed: Path, tmp_path: Path) -> None:
    """Packed, masked, mixed, with skipped batches: stopped and resumed, bit-equal on as many ranks.

    The weights change while it is stopped at step 6: what is behind keeps its counters.
    """
    common = [
        *(f"data.shards={mixed}", "data.document_mask=true", "data.packing=best_fit"),
        *("data.skip_batches=[[3, 4], [9, 9]]", "batch.micro_size=2", "train.steps=10"),
        *("parallel.zero=0", "eval.every_steps=5"),
    ]
    scheduled = [*common, f"data.weight_schedule={SCHEDULE}"]
    straight = train(config, tmp_path / "straight", scheduled, world=2)
    train(config, tmp_path / "stopped", [*scheduled, "train.stop_at_step=6"], world=2)
    shutil.copytree(tmp_path / "stopped", tmp_path / "changed")
    shutil.copytree(tmp_path / "stopped", tmp_path / "elastic")
    assert train(config, tmp_path / "stopped", scheduled, world=2) == straight

    last = straight[-1]
    assert last["step"] == 10
    # Ten steps of four samples and three skipped batches: 16 samples at 1 : 1, then 36 at 1 : 7.
    assert (last["samples_prose"], last["samples_code"]) == (8 + 5, 8 + 31)
    assert last["tokens"] == 10 * 4 * 16
    state = read_state(tmp_path / "straight" / "checkpoints" / "step_00000010")
    assert (state.next_sample, state.skipped_batches, state.batches) == (52, 3, 13)
    assert [segment.first_sample for segment in state.mixture] == [0, 16]
    position = state.model_dump_json(exclude={"layout"})
    assert len(position) < 1000, position
    log = next((tmp_path / "straight" / "logs").glob("*0*")).read_text()
    assert "mixture from sample 16: prose 12.50%, code 87.50%" in log
    assert "batches 3 to 4 skipped, as data.skip_batches or a rollback says" in log
    assert "best-fit packing" in log
    log = next((tmp_path / "stopped" / "logs").glob("*0*")).read_text()
    assert "batches 3 to 4 of the data order lie behind, no effect" in log
    assert "batches 9 to 9 of the data order are not trained on" in log
    assert re.search(r"epochs behind: prose 0\.\d+, code 0\.\d+", log)

    # On one rank the same global batches come, so the losses agree but for the order of sums.
    alone = train(config, tmp_path / "elastic", [*scheduled, "batch.micro_size=4"])
    for ours, theirs in zip(alone[6:], straight[6:], strict=True):
        for key in ("loss_head_1", "loss_head_3", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (ours["step"], key)
        assert ours["samples_code"] == theirs["samples_code"]

    changed = train(config, tmp_path / "changed", [*common, "data.weights={prose: 1}"], world=2)
    assert changed[:6] == straight[:6]
    before, after = changed[5], changed[-1]
    assert after["samples_code"] == before["samples_code"]
    assert after["samples_prose"] == before["samples_prose"] + 5 * 4
    state = read_state(tmp_path / "changed" / "checkpoints" / "step_00000010")
    assert [segment.first_sample for segment in state.mixture] == [0, 16, 32]


def test_what_does_not_fit_is_refused_with_the_difference(
    config: Path, mixed: Path, tmp_path: Path
) -> None:
    """Unknown sources before anything is built; other shards with what changed in each source."""
    fits = [f"data.shards={mixed}", "train.stop_at_step=1"]
    unknown = [*fits, "data.weights={prosa: 1, code: 1}"]
    outcome = run_job(tmp_path, [str(config), "--set", *unknown])
    assert outcome.codes == [2]
    assert "name the source prosa" in outcome.output[0]
    assert "nearest: prose" in outcome.output[0]
    train(config, tmp_path / "run", fits)
    other = make_set(tmp_path / "other", 100)
    for settings, parts in (
        ([f"data.shards={other}"], ["source prose: ", "documents, now ", "source code: "]),
        (["data.packing=best_fit"], ["data.packing: saved with concat, this run has best_fit"]),
    ):
        outcome = run_job(tmp_path, [str(config), "--set", *fits, *settings])
        assert outcome.codes == [2], outcome.output
        (line,) = outcome.errors
        assert all(part in line for part in parts), line
