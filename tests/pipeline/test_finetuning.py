"""Finetuning end to end, by the commands: from an export to one, as many, and more heads."""

import json
import math
from pathlib import Path

import pytest
import yaml

from data_prep.shard import main as shard_main
from model.hugging_face.importing import LlamaFolder
from tests.support.tiny_export import export_tiny
from tests.support.training_runs import CONFIG, run_job


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder with an export of three heads, and prompts longer than some sequences."""
    export_tiny(tmp_path / "export")
    lines = [
        {"q": f"{n} + {n} =" + " " * (60 * (n % 3 == 0)), "a": f" {2 * n}!"} for n in range(120)
    ]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code = shard_main(
        [
            *("--input", str(tmp_path / "qa.jsonl"), "--output", str(tmp_path / "qa")),
            *("--prompt-key", "q", "--completion-key", "a", "--workers", "1"),
            *("--tokenizer", str(tmp_path / "export"), "--validation-fraction", "0.2"),
        ]
    )
    assert code == 0
    return tmp_path


def arguments(folder: Path, heads: int, packing: str) -> list[str]:
    """Of a run of six steps of one sequence, with the sizes of the export."""
    llama = LlamaFolder(folder / "export")
    config = yaml.safe_load(CONFIG)
    config["model"] |= llama.sizes.keys
    config["model"] |= {"future_tokens": heads, "layers": llama.sizes.layers - 1 + heads}
    config["model"]["vocab_size"] = llama.sizes.vocab_size
    config["run"]["dir"] = str(folder / f"run-{heads}-{packing}")
    config["data"] |= {"shards": str(folder / "qa"), "packing": packing}
    config["batch"]["micro_size"] = 1
    config["parallel"]["zero"] = 0
    config["train"] |= {"steps": 6, "init_from": str(folder / "export")}
    config["checkpoint"]["every_steps"] = 6
    path = folder / f"{heads}-{packing}.yaml"
    path.write_text(yaml.safe_dump(config))
    return [str(path)]


@pytest.mark.parametrize(
    ("heads", "packing"), [(1, "concat"), (3, "best_fit"), (4, "one_per_sequence")]
)
def test_an_export_is_finetuned(made: Path, heads: int, packing: str) -> None:
    """Every head has finite losses, also in steps whose sequence is a prompt and no more."""
    outcome = run_job(made, arguments(made, heads, packing))
    assert outcome.codes == [0], outcome.output
    assert "completions and their ends, no prompts" in outcome.output[0]
    run = made / f"run-{heads}-{packing}"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record[f"loss_head_{k}"] for record in records for k in range(1, heads + 1)]
    assert len(losses) == 6 * heads
    assert all(map(math.isfinite, losses))
    assert max(losses) > 1
    if packing == "one_per_sequence":
        assert min(losses) == 0, "no step without a target, so the test shows less than it says"
    assert [r["eval_loss_head_1"] for r in records if "eval_loss_head_1" in r]
    assert all(record["grad_norm"] >= 0 for record in records)


def test_a_checkpoint_must_be_exported_first(made: Path) -> None:
    """The message has the command."""
    config = yaml.safe_load(Path(arguments(made, 3, "concat")[0]).read_text())
    step = made / "runs" / "checkpoints" / "step_00000006"
    step.mkdir(parents=True)
    (step / "manifest.json").write_text("{}")
    for folder in (step, made / "runs"):
        config["train"]["init_from"] = str(folder)
        (made / "bad.yaml").write_text(yaml.safe_dump(config))
        outcome = run_job(made, [str(made / "bad.yaml")])
        assert outcome.codes == [2]
        (line,) = outcome.errors
        assert f"python -m pipeline.export {folder} EXPORT" in line
