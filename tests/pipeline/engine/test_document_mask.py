"""`data.document_mask: true` from the command line: train, evaluate, resume, other layouts."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from data_prep.shards.shard_set import ShardSet
from model.hugging_face.loading import build_model
from pipeline.checkpoint.file_names import WEIGHTS
from pipeline.checkpoint.files import checkpoint_path
from pipeline.checkpoint.folder import read_config
from pipeline.checkpoint.sharded_tensors import read_weights
from pipeline.export import main as export_main
from tests.support.tiny_model import head_logits
from tests.support.training_runs import last_step, metrics_without_times, run_job

SEQUENCE, SAMPLES, HEADS = 256, 32, 3
SETTINGS = [
    f"data.sequence_length={SEQUENCE}",
    "data.document_mask=true",
    f"eval.samples={SAMPLES}",
    "train.steps=8",
    "checkpoint.every_steps=4",
]


def _losses_of_documents_alone(run_dir: Path, shards: Path) -> list[float]:
    """Each head's loss on the validation rows, cut at the end-of-document tokens.

    Every piece of a document goes through the model alone, as a row without a mask.
    """
    checkpoint = checkpoint_path(run_dir)
    config = read_config(checkpoint).model
    weights = read_weights(checkpoint / WEIGHTS, config)
    model = build_model(config, weights, torch.float64)
    validation = ShardSet.open(shards, "validation")
    sums, counts, pieces = [0.0] * HEADS, [0] * HEADS, 0
    for sample in range(SAMPLES):
        row = validation.read(sample * SEQUENCE, SEQUENCE + HEADS).astype(int).tolist()
        start = 0
        while start < SEQUENCE:
            eos = row.index(validation.eos_id, start) if validation.eos_id in row[start:] else None
            end = len(row) if eos is None else eos + 1
            piece = torch.tensor(row[start:end])
            inputs = piece[: SEQUENCE - start]
            logits = head_logits(model, inputs.unsqueeze(0))[:, 0]
            for k in range(1, HEADS + 1):
                targets = piece[k : k + len(inputs)]
                predicted = logits[k - 1, : len(targets)]
                loss = torch.nn.functional.cross_entropy(predicted, targets, reduction="sum")
                sums[k - 1] += float(loss)
                counts[k - 1] += len(targets)
            pieces += 1
            start = end
    assert pieces > 1.2 * SAMPLES  # rows do hold several documents
    return [total / count for total, count in zip(sums, counts, strict=True)]


@pytest.mark.stress
def test_validation_loss_is_that_of_documents_alone(
    config: Path, shards: Path, tmp_path: Path
) -> None:
    """Loader, mask and labels together, for every head; and a stopped run goes on exactly.

    The shards' own end-of-document tokens say where documents end, so numbers that the loader
    derives wrongly from the offsets would show. Without the mask the losses are others.
    """
    straight, stopped, plain = (tmp_path / name for name in ("straight", "stopped", "plain"))
    arguments = [str(config), "--set", *SETTINGS]
    outcome = run_job(tmp_path, [*arguments, f"run.dir={straight}"])
    assert outcome.codes == [0], outcome.output
    assert "documents     kept apart" in outcome.output[0]
    records = metrics_without_times(straight)
    found = [records[-1][f"eval_loss_head_{k}"] for k in range(1, HEADS + 1)]
    assert found == pytest.approx(_losses_of_documents_alone(straight, shards), rel=1e-5)
    assert records[-1]["loss"] < records[0]["loss"]

    for stop in (4, 8):
        arguments = [str(config), "--set", *SETTINGS, f"run.dir={stopped}"]
        assert run_job(tmp_path, [*arguments, f"train.stop_at_step={stop}"]).codes == [0]
        assert last_step(stopped) == stop
    assert metrics_without_times(stopped) == records

    arguments = [str(config), "--set", *SETTINGS, f"run.dir={plain}", "data.document_mask=false"]
    assert run_job(tmp_path, arguments).codes == [0]
    assert metrics_without_times(plain)[0]["loss_head_1"] != pytest.approx(
        records[0]["loss_head_1"], rel=1e-5
    )
    outcome = run_job(tmp_path, [*arguments, "data.document_mask=true"])
    assert "data.document_mask was false up to here and is true from here on" in outcome.output[0]


@pytest.mark.stress
def test_layouts_agree_on_masked_documents(config: Path, tmp_path: Path) -> None:
    """Two tensor-parallel ranks, two data-parallel ones with ZeRO-3 and accumulation, and bf16."""
    figures = []
    for name, world, settings in (
        ("one", 1, ["parallel.zero=0"]),
        ("tensor", 2, ["parallel.tensor=2", "parallel.zero=1"]),
        ("data", 2, ["batch.micro_size=1", "batch.accumulation=2"]),
        ("bf16", 1, ["train.precision=bf16"]),
    ):
        run_dir = tmp_path / name
        arguments = [str(config), "--set", *SETTINGS, *settings, f"run.dir={run_dir}"]
        outcome = run_job(tmp_path, arguments, world=world)
        assert outcome.codes == [0] * world, outcome.output
        figures.append(
            [
                [
                    v
                    for k, v in sorted(record.items())
                    if k.startswith(("loss", "eval_loss", "grad"))
                ]
                for record in metrics_without_times(run_dir)
            ]
        )
    tolerances = (1e-4, 1e-4, 0.05)  # fp32 over eight steps; the 8 bits of bf16
    for other, tolerance in zip(figures[1:], tolerances, strict=True):
        for step, expected in zip(other, figures[0], strict=True):
            assert step == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("mask", [True, False])
def test_its_export_has_no_beginning_of_text(mask: bool, config: Path, tmp_path: Path) -> None:
    """With the mask nothing follows an end of text; without it, a text may begin from one."""
    settings = ["train.steps=1", f"data.document_mask={str(mask).lower()}"]
    assert run_job(tmp_path, [str(config), "--set", *settings]).codes == [0]
    export = tmp_path / "export"
    assert export_main([str(tmp_path / "run"), str(export)]) == 0
    for name in ("config.json", "generation_config.json"):
        content = json.loads((export / name).read_text())
        assert content["bos_token_id"] == (None if mask else 256)
        assert content["eos_token_id"] == 256
    assert AutoTokenizer.from_pretrained(export).bos_token == (None if mask else "<|endoftext|>")
    beginning = "none: with `data.document_mask`" if mask else "'<\\|endoftext\\|>', the end"
    assert f"| Beginning of text | {beginning}" in (export / "README.md").read_text()
    checkpoint = next((tmp_path / "run" / "checkpoints").glob("step_*"))
    assert not (checkpoint / "imported.json").exists()
