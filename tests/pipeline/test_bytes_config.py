"""`configs/bytes.yaml` from source code to drafts of eight bytes, in its short form."""

import json
import math
from pathlib import Path

import pytest

from data_prep.shard import main as shard
from model.generate import main as generate
from pipeline.export import main as export
from tests.support.training_runs import metrics_without_times, run_job

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "bytes.yaml"
HEADS = range(1, 9)


def test_bytes_from_source_code_to_eight_drafts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shards, training, bits per byte of every head, and decoding that drafts 8 bytes."""
    shards = tmp_path / "shards"
    source = ["--input", str(ROOT / "model"), "--tokenizer", "bytes", "--workers", "1"]
    assert shard([*source, "--validation-fraction", "0.2", "--output", str(shards)]) == 0
    settings = [
        *("train.steps=12", "eval.every_steps=6", "eval.samples=8", "batch.micro_size=4"),
        *("log.interval=1", "log.tensorboard=false", "train.device=cpu", "train.precision=fp32"),
        *(f"run.dir={tmp_path / 'run'}", f"data.shards={shards}"),
    ]
    outcome = run_job(tmp_path, [str(CONFIG), "--set", *settings])
    assert outcome.codes == [0], outcome.output
    records = metrics_without_times(tmp_path / "run")
    losses = [record["loss_head_1"] for record in records]
    assert losses[-1] < losses[0] - 0.5
    for record in (record for record in records if "eval_loss" in record):
        for head in HEADS:
            bits, loss = (record[f"eval_{kind}_head_{head}"] for kind in ("bits_per_byte", "loss"))
            # A token is a byte; only ends of documents spell none, and there are few.
            assert loss / math.log(2) <= bits < 1.01 * loss / math.log(2)
    assert export([str(tmp_path / "run"), str(tmp_path / "export")]) == 0
    told = json.loads((tmp_path / "export" / "config.json").read_text())
    assert (told["future_tokens"], told["lm_head"], told["vocab_size"]) == (8, "replicated", 264)
    capsys.readouterr()
    decode = ["--heads", "8", "--compare", "--prompt", "def ", "--max-new-tokens", "40"]
    assert generate([str(tmp_path / "export"), *decode]) == 0
    compared = "".join(capsys.readouterr())
    assert "outputs are equal" in compared
    assert "8 heads: 40 tokens" in compared
