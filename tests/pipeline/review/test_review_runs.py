"""Runs with data.review through the real command: what is recorded, chosen, and resumed."""

import html
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep.loading.loader import BatchLayout, TokenLoader
from data_prep.loading.selection import KeptSequences
from data_prep.loading.sequences import SequenceFormat
from data_prep.shards.shard_set import ShardSet
from pipeline.checkpoint.folder import read_config
from pipeline.config.run_config import load_config
from pipeline.reporting.review_page import review_page
from pipeline.review.examples import examples_of
from pipeline.review.profile import hardest_and_most_forgotten
from tests.pipeline.conftest import written_config
from tests.support.review_runs import (
    LAYOUTS,
    LENGTH,
    ONE,
    SAVING,
    SETTINGS,
    forward_losses,
    last_step_of,
    review_arrays,
    reviewed_run,
    saved_at,
)
from tests.support.training_runs import metrics_without_times, run_job

ROOT = Path(__file__).parents[3]
FIRST, KEPT = "losses_epoch_01.npy", "kept_phase_2.npy"


@pytest.fixture(scope="module")
def straight(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one rank that nothing interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    return reviewed_run(written_config(shards, folder), folder, *ONE, *SAVING)


def test_each_epoch_has_a_record_of_each_of_its_sequences(straight: Path) -> None:
    """L3, L4, L7, L9: records, tokens, and selections that follow from the arrays alone."""
    arrays = review_arrays(straight / "review")
    losses = [arrays[f"losses_epoch_{n:02d}.npy"] for n in range(1, 6)]
    total = len(losses[0])
    kept = {
        phase: np.flatnonzero(np.unpackbits(arrays[f"kept_phase_{phase}.npy"])[:total])
        for phase in (2, 4)
    }
    assert [int((array >= 0).sum()) for array in losses] == [
        *(total, total - total // 2, total - total // 2, total, total - total * 70 // 100)
    ]
    for number in (1, 2):
        np.testing.assert_array_equal(np.flatnonzero(losses[number] >= 0), kept[2])
    np.testing.assert_array_equal(np.flatnonzero(losses[4] >= 0), kept[4])
    for phase, judge, dropped in ((2, losses[0], total // 2), (4, losses[3], total * 70 // 100)):
        expected = KeptSequences.by_loss(judge, dropped)
        np.testing.assert_array_equal(arrays[f"kept_phase_{phase}.npy"], expected.bits)
    records = metrics_without_times(straight)
    assert records[-1]["tokens"] == LENGTH * sum(int((array >= 0).sum()) for array in losses)
    assert [record["review_phase"] for record in records] == sorted(
        record["review_phase"] for record in records
    )
    assert {record["review_epoch"] for record in records} == {1, 2, 3, 4, 5}
    index = json.loads((straight / "review" / "index.json").read_text())
    assert index["files"].keys() == arrays.keys()
    # The last rate is that of the schedule's end: it spans the whole run.
    assert records[-1]["learning_rate"] == pytest.approx(3e-3 * 0.03)


def test_a_record_is_the_loss_of_a_forward_apart(straight: Path, shards: Path) -> None:
    """L6: with the weights of the last checkpoint before a step, every sequence of that step."""
    checkpoint = saved_at(straight, 5)
    form = SequenceFormat(LENGTH, read_config(checkpoint).model.future_tokens)
    loader = TokenLoader(ShardSet.open(shards, "train"), form, BatchLayout(1), seed=7, shuffle=True)
    losses = np.load(straight / "review" / "losses_epoch_01.npy")
    _, numbers = loader._order.locate(5 * 16, 16)
    expected = forward_losses(checkpoint, loader, 5 * 16, 16)
    np.testing.assert_allclose(losses[numbers], expected, rtol=2e-5)


@pytest.mark.parametrize(
    "past",
    [0, pytest.param(3, marks=pytest.mark.stress)],
    ids=["before a choice", "within an epoch"],
)
def test_a_run_resumed_anywhere_goes_on_to_the_bit(
    straight: Path, config: Path, tmp_path: Path, past: int
) -> None:
    """L5: ids, losses and selections, and the curve."""
    step = last_step_of(straight, 1) + past
    run_dir = reviewed_run(config, tmp_path, *ONE, resume=saved_at(straight, step))
    assert metrics_without_times(run_dir) == metrics_without_times(straight)[step:]
    found, expected = review_arrays(run_dir / "review"), review_arrays(straight / "review")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_other_keys_of_the_review_are_refused_by_their_names(
    straight: Path, config: Path, tmp_path: Path
) -> None:
    """At a resume; a run without phases does not go on with one that has them, either."""
    command = [str(config), "--resume", str(saved_at(straight, 3)), "--set", *SETTINGS, *ONE]
    command += [f"run.dir={tmp_path / 'run'}"]
    for change, told in (
        (["data.review.min_targets=5"], "data.review: saved with other min_targets than this"),
        (["data.review=null", "train.steps=9"], "saved with phases, and this run has no phases"),
    ):
        outcome = run_job(tmp_path, [*command, *change])
        assert outcome.codes == [2], outcome.output
        assert told in outcome.errors[0]


@pytest.mark.parametrize(
    "layout",
    [
        "dp2",
        *(pytest.param(name, marks=pytest.mark.stress) for name in LAYOUTS if name != "dp2"),
    ],
)
def test_another_layout_records_the_same(
    straight: Path, config: Path, tmp_path: Path, layout: str
) -> None:
    """The first epoch's losses to rounding, each once, and a choice that follows from them.

    Begun on one rank, resumed in another layout within the epoch, on one rank before the choice.
    """
    world, settings = LAYOUTS[layout]
    border, saved = last_step_of(straight, 1), saved_at(straight, 10)
    stop = f"train.stop_at_step={border}"
    run_dir = reviewed_run(config, tmp_path, *settings, stop, world=world, resume=saved)
    reviewed_run(config, tmp_path, *ONE, f"train.stop_at_step={border + 1}")
    before, expected = (np.load(f / "review" / FIRST) for f in (saved, straight))
    found, done = np.load(run_dir / "review" / FIRST), before >= 0
    assert 0 < np.count_nonzero(done) < len(done)
    np.testing.assert_array_equal(found[done], before[done])
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    chosen = KeptSequences.by_loss(found, len(found) // 2)
    np.testing.assert_array_equal(np.load(run_dir / "review" / KEPT), chosen.bits)


def test_a_choice_is_the_same_on_any_ranks(straight: Path, config: Path, tmp_path: Path) -> None:
    """L7: one rank recorded the losses and two choose, to the bit."""
    step = last_step_of(straight, 1)
    world, settings = LAYOUTS["dp2"]
    stop = f"train.stop_at_step={step + 1}"
    run_dir = reviewed_run(
        config, tmp_path, *settings, stop, world=world, resume=saved_at(straight, step)
    )
    kept, expected = (np.load(folder / "review" / KEPT) for folder in (run_dir, straight))
    np.testing.assert_array_equal(kept, expected)


def test_the_page_shows_the_text_of_sequences(straight: Path, shards: Path, tmp_path: Path) -> None:
    """As it stands in the corpus, the hardest first; without its shards it says so."""
    review = straight / "review"
    epochs = [np.load(path) for path in sorted(review.glob("losses_epoch_*"))]
    hardest, _ = hardest_and_most_forgotten(epochs, 3)
    opened = ShardSet.open(shards, "train")
    stream = bytes(opened.read(0, opened.num_tokens).clip(max=255).astype(np.uint8)).decode("latin")
    for one, number in zip(examples_of(straight, epochs, hardest), hardest, strict=True):
        assert (one.number, one.source) == (number, "corpus")
        assert [loss is None for loss in one.losses] == [bool(e[number] < 0) for e in epochs]
        # A document's end is a byte of no meaning in `stream`, and a name in the text.
        longest = max(one.text.split(opened.manifest.tokenizer.eos_token), key=len)
        assert len(longest) > 20
        assert longest in stream
        assert html.escape(longest[:20]) in review_page(straight)
    moved = tmp_path / "moved"
    shutil.copytree(review, moved / "review")
    text = (straight / "config.yaml").read_text()
    (moved / "config.yaml").write_text(text.replace(str(shards), str(tmp_path / "gone")))
    assert "The texts cannot be shown" in review_page(moved)
    (moved / "config.yaml").write_text(text)
    index = moved / "review" / "index.json"
    index.write_text(index.read_text().replace(opened.fingerprint, "0" * 16))
    assert "are other shards than those that" in review_page(moved)


def test_nothing_left_out_is_plain_training(config: Path, tmp_path: Path) -> None:
    """L2: the metrics of a run over as many epochs, to the bit."""
    phases = "data.review={phases: [{name: all, epochs: 2}, {name: again}]}"
    records = metrics_without_times(reviewed_run(config, tmp_path / "reviewed", *ONE, phases))
    steps = len(records)
    plain = tmp_path / "plain"
    plain.mkdir()
    settings = [s for s in SETTINGS if not s.startswith(("train.steps", "data.review"))]
    settings += [*ONE, f"train.steps={steps}", f"run.dir={plain / 'run'}"]
    assert run_job(plain, [str(config), "--set", *settings]).codes == [0]
    stripped = [
        {k: v for k, v in record.items() if not k.startswith("review_")} for record in records
    ]
    # The last step of the review has what is left, the plain run's goes on into a fourth epoch.
    assert stripped[:-1] == metrics_without_times(plain / "run")[:-1]


def test_trivial_text_is_left_out(config: Path, tmp_path: Path) -> None:
    """L8: of half repetitions and half random letters, the half that stays is random.

    All of it, once the first steps' sequences, when all text was as hard, have been read again; by
    the losses as they are, of the sequences that came after those.
    """
    generator = random.Random(3)
    corpus = tmp_path / "corpus.jsonl"
    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = ["ab" * 80 if n % 2 else "".join(generator.choices(letters, k=160)) for n in range(320)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = [sys.executable, str(ROOT / "data_prep" / "shard.py"), "--input", str(corpus)]
    command += ["--output", str(tmp_path / "set"), "--tokenizer", "bytes", "--workers", "1"]
    subprocess.run(command, check=True, capture_output=True)
    phases = "[{name: learn}, {name: focus, drop_percent: 50}]"
    run_dir = reviewed_run(
        config,
        tmp_path / "run",
        *(*ONE, f"data.review={{phases: {phases}, staleness: rescore, rescore_percent: 60}}"),
        *(f"data.shards={tmp_path / 'set'}", "data.packing=one_per_sequence"),
        *("data.sequence_length=161", "train.stop_at_step=21"),
    )
    opened = ShardSet.open(tmp_path / "set", "train")
    form = SequenceFormat(161, 3, "one_per_sequence")
    loader = TokenLoader(opened, form, BatchLayout(1), seed=7, shuffle=False)
    arrays, total = review_arrays(run_dir / "review"), loader.num_samples
    hard = np.array([len(set(loader.read(n, 1).tokens[0].tolist())) > 4 for n in range(total)])
    assert abs(int(hard.sum()) - total / 2) <= 1
    kept = np.unpackbits(arrays["kept_phase_2.npy"])[:total].astype(bool)
    assert np.count_nonzero(kept & ~hard) <= 1
    late, losses = arrays["rescored_phase_2.npy"] < 0, arrays["losses_epoch_01.npy"]
    chosen = KeptSequences.by_loss(losses[late], int(np.count_nonzero(~hard[late])))
    np.testing.assert_array_equal(chosen(np.arange(chosen.count)), np.flatnonzero(hard[late]))


@pytest.mark.stress
def test_a_model_with_a_memory_records_the_loss_of_a_forward_apart(
    config: Path, tmp_path: Path
) -> None:
    """L6: where no weight moves, losses of training are those of reading again, by segments."""
    run_dir = reviewed_run(
        config,
        tmp_path,
        *(*ONE, "optimizer.learning_rate=1e-15"),
        "data.review={phases: [{name: a}, {name: b, drop_percent: 50}], staleness: rescore}",
        "model.memory={segment: 80, summary: 8, sensory: 4, cache: 3, bptt: 1}",
    )
    arrays = review_arrays(run_dir / "review")
    np.testing.assert_allclose(
        arrays["losses_epoch_01.npy"], arrays["rescored_phase_2.npy"], rtol=1e-6
    )
    assert len(np.unique(arrays["losses_epoch_01.npy"])) > len(arrays["losses_epoch_01.npy"]) // 2


TINY = [
    *("model.hidden_size=32", "model.ffn_hidden_size=48", "eval.every_steps=4", "eval.samples=4"),
    *("log.tensorboard=false", "train.device=cpu", "train.precision=fp32"),
    *("data.sequence_length=32", "model.vocab_size=260", "data.review.sequences=40"),
    *("train.stop_at_step=11", "schedule.warmup_steps=2"),
]


def test_quickstart_has_the_same_losses_on_any_ranks(shards: Path, tmp_path: Path) -> None:
    """`configs/quickstart_lfr.yaml` in small, into its second choice, to the bit on 1 and 2 ranks.

    A step of two micro-batches on one rank adds the same two gradients up.
    """
    path, runs = ROOT / "configs" / "quickstart_lfr.yaml", []
    assert load_config(path).batch == load_config(ROOT / "configs" / "quickstart.yaml").batch
    for world, micro in ((1, ("micro_size=2", "accumulation=2")), (2, ("micro_size=2",))):
        folder = tmp_path / str(world)
        settings = [*TINY, f"run.dir={folder}", f"data.shards={shards}"]
        settings += [f"batch.{key}" for key in micro]
        outcome = run_job(tmp_path, [str(path), "--set", *settings], world=world)
        assert outcome.codes == [0] * world, outcome.output
        runs.append(folder)
    one, two = (review_arrays(folder / "review") for folder in runs)
    assert {"kept_phase_2.npy", "losses_epoch_01.npy"} <= one.keys() == two.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(two[name], array)
    for first, second in zip(*map(metrics_without_times, runs), strict=True):
        assert {k: v for k, v in first.items() if "loss" in k} == {
            k: v for k, v in second.items() if "loss" in k
        }
