"""Whole runs of a model with a memory: `configs/quickstart_hmt.yaml`, resumes, imports."""

import json
import re
from pathlib import Path

import pytest
import torch

from model.errors import ConfigError
from model.generate import main as generate
from model.hugging_face.loading import load_export
from model.inference.loading import load_network
from model.memory.adapters import adapters_of, is_adapter
from pipeline.checkpoint.file_names import WEIGHTS
from pipeline.checkpoint.sharded_tensors import read_weights
from pipeline.config.run_config import load_config
from pipeline.export import main as export
from tests.support.tiny_llama import save_llama
from tests.support.training_runs import metrics_without_times, run_job

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "quickstart_hmt.yaml"
TINY = [
    *("model.hidden_size=32", "model.ffn_hidden_size=48", "train.steps=4", "eval.every_steps=2"),
    *("eval.samples=4", "checkpoint.every_steps=2", "log.tensorboard=false", "train.device=cpu"),
    *("train.precision=fp32", "data.sequence_length=32", "model.vocab_size=260"),
    "model.memory={segment: 8, summary: 4, sensory: 2, cache: 3, bptt: 1}",
    "parallel.zero=1",
]


def test_quickstart_configuration_keeps_the_batch_of_the_quickstart() -> None:
    """Same batch keys, so that the two can be compared."""
    assert load_config(CONFIG).batch == load_config(ROOT / "configs" / "quickstart.yaml").batch


def test_one_key_of_a_mapping_can_be_set() -> None:
    """The others stay as the file has them."""
    memory = load_config(CONFIG, ["model.memory.bptt=5"]).model.memory
    assert memory is not None
    assert (memory.bptt, memory.segment) == (5, 64)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["data.sequence_length=64"], "so nothing would be remembered"),
        (["parallel.stages=auto:2"], "cuts the trunk into 2 stages"),
        (["train.activation_checkpointing=full"], "gives a layer a gradient for every segment"),
        (["model.memory.summary=65"], "is more than the 64 tokens of a segment"),
        (["train.freeze=all_but_memory", "train.init_from=x", "model.memory=null"], "leaves noth"),
        (["train.freeze=all_but_memory"], "the memory of a model that was never trained"),
        (["model.memory.adapter_rank=2"], "adds adapters to weights that are trained themselves"),
        (["model.memory.depth=1"], "model.memory.depth is not a known key"),
    ],
)
def test_what_cannot_be_is_refused(settings: list[str], told: str) -> None:
    """In one line, before anything starts."""
    with pytest.raises(Exception, match=told):
        load_config(CONFIG, settings)


def _run(folder: Path, shards: Path, ranks: int, *settings: str) -> Path:
    """A tiny form of the configuration, in `folder`."""
    changes = [*TINY, f"run.dir={folder}", f"data.shards={shards}", *settings]
    outcome = run_job(folder.parent, [str(CONFIG), "--set", *changes], world=ranks)
    assert outcome.codes == [0] * ranks, outcome.output
    return folder


def test_quickstart_has_the_same_losses_on_any_ranks_and_writes(
    tmp_path: Path, shards: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """On 1 and 2 ranks, losses of training and validation; its export goes on with texts."""
    one = _run(tmp_path / "one", shards, 1, "batch.micro_size=4")
    two = _run(tmp_path / "two", shards, 2, "batch.micro_size=2")
    for first, second in zip(metrics_without_times(one), metrics_without_times(two), strict=True):
        for key, value in first.items():
            if "loss" in key:
                assert second[key] == pytest.approx(value, rel=2e-5), key
    _writes(one, tmp_path / "export", tmp_path / "state", capfd)


@pytest.mark.stress
def test_a_resumed_run_repeats_and_stage_2_begins_from_stage_1(
    tmp_path: Path, shards: Path
) -> None:
    """To the bit; and an export without retrieval gives its memory to a run with it."""
    whole = _run(tmp_path / "whole", shards, 2, "batch.micro_size=2")
    _run(tmp_path / "parts", shards, 2, "batch.micro_size=2", "train.stop_at_step=2")
    parts = _run(tmp_path / "parts", shards, 2, "batch.micro_size=2")
    assert metrics_without_times(parts) == metrics_without_times(whole)
    stage_1 = _run(tmp_path / "stage1", shards, 1, "model.memory.retrieval=false")
    assert export([str(stage_1), str(tmp_path / "export")]) == 0
    stage_2 = _run(
        tmp_path / "stage2", shards, 1, f"train.init_from={tmp_path / 'export'}", "train.steps=1"
    )
    log = (stage_2 / "logs" / "rank_00000.log").read_text()
    assert "the memory goes on from its own" in log


def _writes(run: Path, folder: Path, state: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The export is no Llama, writes past borders of segments, and goes on from a file."""
    assert export([str(run), str(folder)]) == 0
    told = json.loads((folder / "config.json").read_text())
    assert (told["model_type"], told["memory"]["segment"]) == ("headway", 8)

    def new_ids(*options: str) -> list[int]:
        assert generate([str(folder), "--ids", *options]) == 0
        found = re.search(r"^ids: (.*)$", capfd.readouterr().out, re.MULTILINE)
        assert found is not None
        return [int(number) for number in found[1].split()]

    whole = new_ids("--prompt", "The cat sat", "--max-new-tokens", "30")
    new_ids("--prompt", "The cat ", "--max-new-tokens", "1", "--save-memory", str(state))
    rest = new_ids("--prompt", "sat", "--max-new-tokens", "30", "--load-memory", str(state))
    assert rest == whole
    assert generate([str(folder), "--prompt", "a", "--heads", "2"]) == 1
    with pytest.raises(ConfigError, match="alone run"):
        load_network(folder)


def test_a_llama_stays_as_it_is_but_for_its_memory(tmp_path: Path, shards: Path) -> None:
    """Its memory and low-rank adapters alone move; an export has the adapters in its weights."""
    save_llama(tmp_path / "llama")
    settings = [
        *(change for change in TINY if not change.startswith("model.")),
        *(
            "model.layers=4",
            "model.future_tokens=1",
            "model.hidden_size=32",
            "model.vocab_size=260",
        ),
        *("model.ffn_hidden_size=48", "model.rope_theta=500.0", "model.norm_eps=2e-5"),
        "model.memory={segment: 8, bptt: 1, adapter_rank: 2, adapter_alpha: 6}",
        f"train.init_from={tmp_path / 'llama'}",
        *("train.freeze=all_but_memory", f"run.dir={tmp_path / 'run'}", f"data.shards={shards}"),
        *("batch.micro_size=2", "eval.every_steps=0"),
    ]
    outcome = run_job(tmp_path, [str(CONFIG), "--set", *settings], world=2)
    assert outcome.codes == [0, 0], outcome.output
    config = load_config(CONFIG, settings)
    folder = tmp_path / "run" / "checkpoints"
    before, after = (
        dict(read_weights(folder / f"step_0000000{step}" / WEIGHTS, config.model))
        for step in (2, 4)
    )
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    own = {f"memory.{name}" for name in ("initial", "summary", "query", "key")}
    adapters = {name for name in after if is_adapter(name)}
    assert len(adapters) == 3 * 4 * 2  # of three layers of the trunk
    assert moved == own | adapters
    assert export([str(tmp_path / "run"), str(tmp_path / "export")]) == 0
    exported = load_export(tmp_path / "export").model
    assert exported.config.memory is not None
    assert exported.config.memory.adapter_rank == 0
    for name, weight in exported.named_parameters():
        expected = after[name]
        if (names := adapters_of(name)) and names[0] in after:
            expected = expected + 6 / 2 * after[names[1]] @ after[names[0]]
            assert not torch.equal(expected, after[name])
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-7)
