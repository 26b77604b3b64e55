"""Runs with data.review through the real command: what is recorded, chosen, and resumed."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from data_prep.loading.loader import IGNORED, BatchLayout, TokenLoader
from data_prep.loading.selection import KeptSequences
from data_prep.loading.sequences import SequenceFormat
from data_prep.shards.shard_set import ShardSet
from pipeline.checkpoint.file_names import WEIGHTS
from pipeline.checkpoint.files import checkpoint_path
from pipeline.checkpoint.folder import read_config
from pipeline.checkpoint.sharded_tensors import read_weights
from tests.pipeline.conftest import written_config
from tests.support.tiny_model import head_logits, tiny_model
from tests.support.training_runs import metrics_without_times, run_job

ROOT = Path(__file__).parents[3]
PHASES = (
    "data.review={phases: [{name: learn}, {name: focus, drop_percent: 50, repetitions: 2}, "
    "{name: review, epochs: 1}, {name: focus, drop_percent: 70}]}"
)
LENGTH = 240
# 16 samples a step in every layout.
SETTINGS = ["train.steps=null", PHASES, "checkpoint.every_steps=5", "checkpoint.keep=40"]
SETTINGS += ["eval.every_steps=0", "parallel.zero=0", f"data.sequence_length={LENGTH}"]
ONE = ["batch.micro_size=4", "batch.accumulation=4"]
LAYOUTS = {
    "dp2": (2, ["batch.micro_size=4", "batch.accumulation=2", "parallel.zero=3"]),
    "tp2": (2, ["batch.micro_size=8", "batch.accumulation=2", "parallel.tensor=2"]),
    "stages2": (
        2,
        [
            *("batch.micro_size=4", "batch.accumulation=4"),
            "parallel.stages=[{trunk: 0-1}, {heads: 1-3}]",
        ],
    ),
}


def _arrays(folder: Path) -> dict[str, NDArray[Any]]:
    return {path.name: np.load(path) for path in sorted(folder.glob("*.npy"))}


def _run(config: Path, folder: Path, *settings: str, world: int = 1) -> Path:
    run_dir = folder / "run"
    folder.mkdir(exist_ok=True)
    arguments = [str(config), "--set", *SETTINGS, f"run.dir={run_dir}", *settings]
    outcome = run_job(folder, arguments, world=world)
    assert outcome.codes == [0] * world, outcome.output
    return run_dir


@pytest.fixture(scope="module")
def straight(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one rank that nothing interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    return _run(written_config(shards, folder), folder, *ONE)


def test_each_epoch_has_a_record_of_each_of_its_sequences(straight: Path) -> None:
    """L3, L4, L7, L9: records, tokens, and selections that follow from the arrays alone."""
    arrays = _arrays(straight / "review")
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
    checkpoint = checkpoint_path(straight / "checkpoints" / "step_00000005")
    config = read_config(checkpoint)
    weights = dict(read_weights(checkpoint / WEIGHTS, config.model))
    model = tiny_model(config.model, weights, torch.float32)
    form = SequenceFormat(config.data.sequence_length, config.model.future_tokens)
    opened = ShardSet.open(shards, "train")
    loader = TokenLoader(opened, form, BatchLayout(1), seed=config.run.seed, shuffle=True)
    losses = np.load(straight / "review" / "losses_epoch_01.npy")
    _, numbers = loader._order.locate(5 * 16, 16)
    batch = loader.read(5 * 16, 16)
    with torch.no_grad():
        logits = head_logits(model, batch.tokens)[0]
        expected = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), batch.labels[0], ignore_index=IGNORED, reduction="none"
        ).mean(1)
    np.testing.assert_allclose(losses[numbers], expected.numpy(), rtol=2e-5)


@pytest.mark.parametrize(
    "place",
    [pytest.param("within an epoch", marks=pytest.mark.stress), "before a selection"],
)
def test_a_run_stopped_anywhere_goes_on_to_the_bit(
    straight: Path, config: Path, tmp_path: Path, place: str
) -> None:
    """L5: ids, losses and selections, and the curve; stopped within an epoch and after one."""
    learnt = [r["step"] for r in metrics_without_times(straight) if r["review_phase"] == 1][-1]
    step = learnt if place == "before a selection" else learnt + 3
    run_dir = _run(config, tmp_path, *ONE, f"train.stop_at_step={step}")
    _run(config, tmp_path, *ONE)
    assert metrics_without_times(run_dir) == metrics_without_times(straight)
    found, expected = _arrays(run_dir / "review"), _arrays(straight / "review")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize(
    "layout",
    [
        LAYOUTS["dp2"],
        pytest.param(LAYOUTS["tp2"], marks=pytest.mark.stress),
        pytest.param(LAYOUTS["stages2"], marks=pytest.mark.stress),
    ],
    ids=LAYOUTS,
)
def test_another_layout_records_the_same(
    straight: Path, config: Path, tmp_path: Path, layout: tuple[int, list[str]]
) -> None:
    """The first epoch's losses to rounding, each once; begun on one rank and resumed in another."""
    world, settings = layout
    run_dir = _run(config, tmp_path, *ONE, "train.stop_at_step=10")
    before = _arrays(run_dir / "checkpoints" / "step_00000010" / "review")
    _run(config, tmp_path, *settings, world=world)
    found, expected = _arrays(run_dir / "review"), _arrays(straight / "review")
    done = before["losses_epoch_01.npy"] >= 0
    np.testing.assert_array_equal(
        found["losses_epoch_01.npy"][done], before["losses_epoch_01.npy"][done]
    )
    np.testing.assert_allclose(
        found["losses_epoch_01.npy"], expected["losses_epoch_01.npy"], rtol=1e-4
    )


def test_nothing_left_out_is_plain_training(config: Path, tmp_path: Path) -> None:
    """L2: the metrics of a run over as many epochs, to the bit."""
    phases = "data.review={phases: [{name: all, epochs: 2}, {name: again}]}"
    reviewed = _run(config, tmp_path / "reviewed", *ONE, phases)
    records = metrics_without_times(reviewed)
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

    By a second epoch: in the first steps of the first one all text is as hard.
    """
    generator = random.Random(3)
    corpus = tmp_path / "corpus.jsonl"
    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = ["ab" * 80 if n % 2 else "".join(generator.choices(letters, k=160)) for n in range(160)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = [sys.executable, str(ROOT / "data_prep" / "shard.py"), "--input", str(corpus)]
    command += ["--output", str(tmp_path / "set"), "--tokenizer", "bytes", "--workers", "1"]
    subprocess.run(command, check=True, capture_output=True)
    phases = "[{name: read}, {name: learn}, {name: focus, drop_percent: 50}]"
    run_dir = _run(
        config,
        tmp_path / "run",
        *(
            *ONE,
            f"data.review={{phases: {phases}}}",
            f"data.shards={tmp_path / 'set'}",
            "data.packing=one_per_sequence",
        ),
        "data.sequence_length=161",
    )
    opened = ShardSet.open(tmp_path / "set", "train")
    loader = TokenLoader(
        opened, SequenceFormat(161, 3, "one_per_sequence"), BatchLayout(1), seed=7, shuffle=False
    )
    kept = np.unpackbits(np.load(run_dir / "review" / "kept_phase_3.npy"))[: loader.num_samples]
    hard = [len(set(loader.read(n, 1).tokens[0].tolist())) > 4 for n in range(loader.num_samples)]
    assert abs(sum(hard) - len(hard) / 2) <= 1
    assert sum(k and not h for k, h in zip(kept.tolist(), hard, strict=True)) <= 1
