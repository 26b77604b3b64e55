"""train.freeze=early_exit: an adapter learns on a model's first layers and drafts for it."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.errors import CheckpointError, ConfigError
from model.generate import main as generate_main
from model.hugging_face.early_exit import LowerLayers, fingerprint, read_early_exit
from model.hugging_face.importing import LlamaFolder
from model.structure.freezing import is_trained
from pipeline.config.run_config import RunConfig
from pipeline.distributed.rendezvous import rank_info
from pipeline.distributed.topology import Topology
from pipeline.engine.build import build_engine
from pipeline.export import main as export_main
from pipeline.exporting.writing import write_export
from pipeline.train import main as train_main
from tests.support.engine_cases import Case, engine_config, local_batches
from tests.support.engine_probes import parameters
from tests.support.harness import run_ranks
from tests.support.long_forms import part_of
from tests.support.tiny_export import VOCABULARY, describe, export_tiny
from tests.support.tiny_llama import save_llama
from tests.support.tiny_model import tiny_config, tiny_weights
from tests.support.training_runs import metrics_without_times, run_job

LAYOUTS = [
    (1, 1, 0),
    (2, 2, 1),
    pytest.param((2, 1, 3), marks=pytest.mark.stress),
]  # ranks, tensor parallel, ZeRO


def _moved(case: Case) -> dict[str, bool]:
    """Which parameters two steps have moved."""
    topology = Topology(rank_info(os.environ), case.tensor, torch.device("cpu"))
    values = engine_config(case).model_dump()
    values["model"] |= {"future_tokens": 1, "head_weights": None}
    values["train"] |= {"freeze": "early_exit", "init_from": "unused"}
    engine = build_engine(RunConfig.model_validate(values), topology, "fp32")
    before = {name: part.clone() for name, part in parameters(engine)}
    for step in range(2):
        batches = [
            batch._replace(labels=batch.labels[:1])
            for batch in local_batches(step, case, topology.data_rank)
        ]
        assert engine.train_step(batches, learning_rate=1e-2).applied
    return {name: not torch.equal(part, before[name]) for name, part in parameters(engine)}


@pytest.fixture
def export(tmp_path: Path, shards: Path) -> Path:
    """A model of three trunk layers and two heads, of the shards' tokenizer."""
    model = tiny_config(vocab_size=VOCABULARY, layers=5, future_tokens=2)
    weights, tokenizer = tiny_weights(model), (shards / "tokenizer.json").read_bytes()
    write_export(tmp_path / "export", describe(model), weights.items(), tokenizer=tokenizer)
    return tmp_path / "export"


def _arguments(config: Path, model: Path, run: Path, *more: str) -> list[str]:
    """A run of an adapter on layer 2."""
    settings = [
        *(f"train.init_from={model}", "train.freeze=early_exit", f"run.dir={run}"),
        *("model.layers=3", "model.future_tokens=1", "model.ffn_hidden_size=48"),
        *("train.steps=6", "eval.every_steps=2", "optimizer.learning_rate=1e-2"),
    ]
    return [str(config), "--set", *settings, *more]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_an_adapter_learns_and_drafts(
    layout: tuple[int, int, int],
    config: Path,
    export: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stopped and resumed as if not; only the adapter differs from the model, and texts do not."""
    world, tensor, zero = layout
    more = (f"parallel.tensor={tensor}", f"parallel.zero={zero}")
    straight, resumed = (
        _arguments(config, export, tmp_path / name, *more) for name in ("straight", "resumed")
    )
    done = run_job(tmp_path, straight, world=world)
    assert set(done.codes) == {0}, done.errors
    assert f"weights from {export}: the first 2 of its 4 layers" in done.output[0]
    assert "adapter on them is a copy of its layer 2; it alone is trained" in done.output[0]
    assert set(run_job(tmp_path, [*resumed, "train.stop_at_step=3"], world=world).codes) == {0}
    away = export.rename(tmp_path / "away")
    assert set(run_job(tmp_path, resumed, world=world).codes) == {0}
    away.rename(export)
    records = metrics_without_times(tmp_path / "straight")
    assert records == metrics_without_times(tmp_path / "resumed")
    assert records[-1]["eval_loss_head_1"] < records[1]["eval_loss_head_1"]

    adapter = tmp_path / "adapter"
    assert export_main([str(tmp_path / "resumed"), str(adapter)]) == 0
    assert "an early-exit adapter on layer 2 of the 4 of export" in capsys.readouterr().out
    found = read_early_exit(adapter)
    assert (found.layer, found.model_layers) == (2, 4)
    before = load_file(export / "model.safetensors")
    after = load_file(adapter / "model.safetensors")
    different = {name for name, part in after.items() if not torch.equal(part, before[name])}
    assert different == {name for name in after if name.startswith("model.layers.2.")}

    decode = [str(export), "--early-exit", str(adapter), "--prompt", "ab c", "--prompt", "d"]
    assert generate_main([*decode, "--compare", "--stats", "--exit-threshold", "0"]) == 0
    out = capsys.readouterr().out
    assert "early exit at layer 2, 1 to 6 drafts: " in out
    assert re.search(r"draft 6: kept \d+ of \d+ times", out)
    assert "outputs are equal" in out


@pytest.mark.parametrize("zero", part_of((0, 1, 3), lambda _, zero: zero > 0))
def test_nothing_but_the_adapter_moves(zero: int) -> None:
    """Under every ZeRO level, decay included."""
    moved = run_ranks(2, _moved, Case(world=2, zero=zero))[0]
    assert moved == {name: is_trained(name, "early_exit") for name in moved}
    assert set(moved.values()) == {True, False}


def test_an_adapter_is_of_one_model(
    config: Path, export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another model is refused in one line, a folder that is no adapter, and a changed record."""
    arguments = _arguments(config, export, tmp_path / "run", "train.steps=1")
    outcome = run_job(tmp_path, arguments)
    assert outcome.codes == [0], outcome.errors
    assert export_main([str(tmp_path / "run"), str(tmp_path / "adapter")]) == 0
    export_tiny(tmp_path / "other", layers=6, future_tokens=3)
    given = ["--early-exit", str(tmp_path / "adapter"), "--prompt", "x"]
    given += ["--max-new-tokens", "8"]
    assert generate_main([str(tmp_path / "other"), *given]) == 1
    error = capsys.readouterr().err
    assert "was trained for other weights than those of" in error
    assert len(error.splitlines()) == 1
    assert generate_main([str(export), "--early-exit", str(export), "--prompt", "x"]) == 1
    assert "so it is not an early-exit adapter" in capsys.readouterr().err
    record = tmp_path / "adapter" / "early_exit.json"
    record.write_text(record.read_text().replace('"layer": 2', '"layer": 0'))
    assert generate_main([str(export), *given]) == 1
    assert "early_exit.json is damaged (layer" in capsys.readouterr().err


def test_the_fingerprint_is_of_the_next_token_model(tmp_path: Path) -> None:
    """Further heads, several files and a wider type leave it as it is; one number changes it."""
    save_llama(tmp_path / "bf16", dtype=torch.bfloat16)
    wanted = fingerprint(LlamaFolder(tmp_path / "bf16"))
    save_llama(tmp_path / "files", dtype=torch.bfloat16, shard_size="20KB")
    assert len(list((tmp_path / "files").glob("*.safetensors"))) > 1
    assert fingerprint(LlamaFolder(tmp_path / "files")) == wanted
    wide = Path(shutil.copytree(tmp_path / "bf16", tmp_path / "wide"))
    weights = {name: part.float() for name, part in load_file(wide / "model.safetensors").items()}
    save_file(weights, wide / "model.safetensors")
    assert fingerprint(LlamaFolder(wide)) == wanted
    weights["model.norm.weight"][3] += 1
    save_file(weights, wide / "model.safetensors")
    assert fingerprint(LlamaFolder(wide)) != wanted
    export_tiny(tmp_path / "heads", layers=6, future_tokens=3)
    plain = Path(shutil.copytree(tmp_path / "heads", tmp_path / "plain"))
    for name in ("headway.json", "extra_heads.safetensors", "all_heads.safetensors.index.json"):
        (plain / name).unlink()
    settings = json.loads((plain / "config.json").read_text())
    del settings["future_tokens"]
    (plain / "config.json").write_text(json.dumps(settings))
    assert (LlamaFolder(plain).heads, LlamaFolder(tmp_path / "heads").heads) == (1, 3)
    assert fingerprint(LlamaFolder(plain)) == fingerprint(LlamaFolder(tmp_path / "heads"))


@pytest.mark.parametrize(
    ("sizes", "trunk"),
    [
        ({"future_tokens": 2}, 4),
        ({"future_tokens": 2, "head_kind": "anticausal"}, 4),
        ({"future_tokens": 2, "head_layers": 2}, 2),
        ({"future_tokens": 2, "head_kind": "linear"}, 6),
    ],
    ids=str,
)
def test_an_exit_is_below_the_heads(sizes: dict[str, Any], trunk: int, tmp_path: Path) -> None:
    """Each kind of heads leaves its trunk, up to whose end a run may go."""
    export_tiny(tmp_path / "export", layers=6, **sizes)
    folder = LowerLayers(tmp_path / "export")
    assert folder.trunk_layers == trunk
    fitting = {"vocab_size": folder.sizes.vocab_size, "future_tokens": 1}
    most = min(trunk + 1, folder.sizes.layers)
    folder.check(tiny_config(layers=most, **fitting))
    with pytest.raises(ConfigError, match=f"set model.layers to at most {most}: "):
        folder.check(tiny_config(layers=most + 1, **fitting))
    with pytest.raises(ConfigError, match=r"model.ffn_hidden_size=64 must be 48; set them"):
        folder.check(tiny_config(layers=2, ffn_hidden_size=64, **fitting))
    with pytest.raises(ConfigError, match=r"model.vocab_size=300 must be 260"):
        folder.check(tiny_config(layers=2, future_tokens=1, vocab_size=300))


def test_an_incomplete_model_is_refused(tmp_path: Path) -> None:
    """Also when what is missing lies above the exit: the adapter is to draft for all of it."""
    save_llama(tmp_path / "llama")
    path = tmp_path / "llama" / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, path)
    folder = LowerLayers(tmp_path / "llama")
    config = tiny_config(layers=2, future_tokens=1, vocab_size=260, rope_theta=500.0, norm_eps=2e-5)
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.up_proj\.weight is missing"):
        folder.check(config)


def test_a_dry_run_says_what_would_be_trained(
    config: Path, export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It looks at the folder, and refuses heads that are no adapter."""
    arguments = [*_arguments(config, export, tmp_path / "run"), "train.init_heads=fresh"]
    assert train_main([*arguments, "--dry-run"]) == 0
    assert "the early-exit adapter on them is fresh; it alone is" in capsys.readouterr().out
    assert train_main([*arguments, "model.future_tokens=2", "--dry-run"]) == 2
    assert "model.future_tokens=2 is of other heads; set model.future" in capsys.readouterr().err
    assert train_main([*arguments, "model.layers=5", "--dry-run"]) == 2
    assert "set model.layers to at most 4" in capsys.readouterr().err
