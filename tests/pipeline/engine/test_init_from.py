"""train.init_from: a run of any layout begins with the weights of a Hugging Face Llama."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model.hugging_face.folder import read_record
from model.hugging_face.importing import ImportedWeights, LlamaFolder
from model.hugging_face.loading import load_export
from pipeline.config.run_config import RunConfig
from pipeline.distributed.rendezvous import rank_info
from pipeline.distributed.topology import Topology
from pipeline.engine.build import build_engine
from pipeline.export import main as export_main
from pipeline.train import main as train_main
from tests.support.engine_cases import Case, engine_config, whole
from tests.support.engine_probes import parameters
from tests.support.harness import run_ranks
from tests.support.long_forms import part_of
from tests.support.original_models import TEMPLATE, said_by
from tests.support.tiny_llama import LLAMA3, imported_model, save_llama
from tests.support.training_runs import metrics_without_times, run_job

CASES = [
    Case(world=1, zero=0),
    Case(world=2, zero=1),
    Case(world=2, tensor=2, zero=2),
    Case(world=2, zero=3),
    Case(world=4, tensor=2, zero=3),
]


def _name(case: Case) -> str:
    return f"world{case.world}-tp{case.tensor}-zero{case.zero}"


@dataclass(frozen=True)
class Settings:
    """What the model of a case is, so that it fits the folder."""

    folder: Path
    vocab_size: int


def _config(case: Case, settings: Settings) -> RunConfig:
    values = engine_config(case).model_dump()
    values["model"] |= LlamaFolder(settings.folder).sizes.keys
    values["model"] |= {"layers": 6, "vocab_size": settings.vocab_size}
    return RunConfig.model_validate(values)


def _begin(case: Case, settings: Settings) -> dict[str, Tensor]:
    """The whole weights that an engine of this layout begins with."""
    topology = Topology(rank_info(os.environ), case.tensor, torch.device("cpu"))
    config = _config(case, settings)
    source = ImportedWeights(
        LlamaFolder(settings.folder),
        config.model,
        tensor_rank=topology.tensor_rank,
        tensor_size=topology.tensor_size,
    )
    engine = build_engine(config, topology, "fp32", source)
    return {name: whole(name, part, topology).detach().clone() for name, part in parameters(engine)}


@pytest.mark.parametrize("case", part_of(CASES, lambda _, case: case.world < 4), ids=_name)
def test_every_layout_begins_with_the_same_weights(case: Case, tmp_path: Path) -> None:
    """Under ZeRO 0 to 3 and tensor parallelism, with a padded vocabulary and a tied embedding."""
    save_llama(tmp_path / "llama", rope=LLAMA3, tie_word_embeddings=True)
    settings = Settings(tmp_path / "llama", vocab_size=300)
    found = run_ranks(case.world, _begin, case, settings)[0]
    expected = imported_model(tmp_path / "llama", _config(case, settings).model)
    for name, parameter in expected.named_parameters():
        rows = 260 if parameter.shape[0] == 300 else parameter.shape[0]
        assert torch.equal(found[name][:rows], parameter[:rows]), name
        if rows == 260:  # fresh rows do not depend on the layout, either
            assert 0.01 < float(found[name][260:].std()) < 0.03
            assert found[name].shape[0] == 300


@pytest.fixture
def llama(tmp_path: Path, shards: Path) -> Path:
    """A Llama whose tokenizer is that of the shards."""
    save_llama(tmp_path / "llama", rope=LLAMA3)
    shutil.copy(shards / "tokenizer.json", tmp_path / "llama" / "tokenizer.json")
    return tmp_path / "llama"


def _arguments(config: Path, llama: Path, **changes: Any) -> list[str]:
    settings = {
        "train.init_from": llama,
        "model.layers": 6,
        "model.ffn_hidden_size": 48,
        "model.rope_theta": 500.0,
        "model.norm_eps": 2e-5,
        "model.rope_scaling": "{" + ", ".join(f"{k}: {v}" for k, v in LLAMA3.items()) + "}",
        "train.steps": 6,
    }
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    return [str(config), "--set", *(f"{key}={value}" for key, value in settings.items())]


def test_pretraining_continues_with_heads_and_resumes_without_the_folder(
    config: Path, llama: Path, tmp_path: Path
) -> None:
    """The command says what it takes, learns, resumes when the folder is gone, and exports."""
    arguments = _arguments(config, llama)
    first = run_job(tmp_path, [*arguments, "train.stop_at_step=3"], world=2)
    assert first.codes == [0, 0], first.output
    assert f"weights from {llama}: 3 trunk layers and head 1" in first.output[0]
    assert "heads 2 to 3 are copies of its layer 3" in first.output[0]
    shutil.rmtree(llama)
    second = run_job(tmp_path, arguments, world=2)
    assert second.codes == [0, 0], second.output
    assert "weights from" not in second.output[0]
    assert f"train.init_from={llama} is not read: the run goes on" in second.output[0]
    records = metrics_without_times(tmp_path / "run")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert records[-1]["loss"] < records[0]["loss"]
    assert export_main([str(tmp_path / "run"), str(tmp_path / "export")]) == 0
    assert load_export(tmp_path / "export").model.config.rope_scaling is not None


def _published(llama: Path) -> None:
    """Give the folder what published models have beside weights and tokenizer.json."""
    tokens: dict[str, Any] = {"bos_token_id": 5, "eos_token_id": [256, 9], "pad_token_id": 7}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "chat_template": TEMPLATE,
        "model_max_length": 1000000000000000019884624838656,
    }
    config = json.loads((llama / "config.json").read_text()) | tokens
    for name, content in (
        ("config.json", config),
        ("generation_config.json", tokens | {"do_sample": True, "top_k": 5}),
        ("tokenizer_config.json", settings),
    ):
        (llama / name).write_text(json.dumps(content))


def test_what_is_not_weights_comes_out_as_it_went_in(
    config: Path, llama: Path, tmp_path: Path
) -> None:
    """Through a save, a resume without the folder and an export, also of a copied checkpoint."""
    _published(llama)
    original = Path(shutil.copytree(llama, tmp_path / "original"))
    rate = {"optimizer__learning_rate": 1e-30, "train__freeze": "trunk"}
    arguments = _arguments(config, llama, **rate)
    arguments.append("checkpoint.every_steps=2")
    assert run_job(tmp_path, [*arguments, "train.stop_at_step=3"], world=2).codes == [0, 0]
    first, _ = sorted((tmp_path / "run" / "checkpoints").glob("step_*"))
    kept = (first / "imported.json").read_bytes()
    shutil.rmtree(llama)
    assert run_job(tmp_path, arguments, world=2).codes == [0, 0]
    _, last = sorted((tmp_path / "run" / "checkpoints").glob("step_*"))
    assert not first.exists()  # deleted with all its files
    assert (last / "imported.json").read_bytes() == kept
    copied = Path(shutil.copytree(last, tmp_path / "elsewhere" / last.name))
    assert export_main([str(copied), str(tmp_path / "export")]) == 0
    assert said_by(tmp_path / "export") == said_by(original)
    card = (tmp_path / "export" / "README.md").read_text()
    ids = "bos_token_id 5, eos_token_id [256, 9], pad_token_id 7; 128 positions"
    assert f"| Kept of `llama` | {ids} |" in card
    assert "| `tokenizer.json` | that of the model, byte for byte |" in card
    assert read_record(tmp_path / "export").description.sequence_length == 128


def test_what_cannot_be_kept_is_said_at_the_start(
    config: Path, llama: Path, tmp_path: Path
) -> None:
    """A file that is none of its kind is named with the reason; the run goes on."""
    (llama / "generation_config.json").write_text("[]")
    outcome = run_job(tmp_path, [*_arguments(config, llama), "train.steps=1"])
    assert outcome.codes == [0]
    words = f"generation_config.json of {llama} is not kept for exports: it is not a mapping"
    assert words in outcome.output[0]


@pytest.mark.parametrize("stages", [1, 2])
def test_without_a_step_the_export_is_the_import(
    stages: int, config: Path, llama: Path, tmp_path: Path
) -> None:
    """At a learning rate of next to nothing, every tensor of the Llama comes out as it went in."""
    before = load_file(llama / "model.safetensors")
    arguments = _arguments(config, llama, optimizer__learning_rate=1e-30, train__steps=1)
    arguments += [f"parallel.stages={stages}", "batch.accumulation=2"]
    assert run_job(tmp_path, arguments, world=2).codes == [0, 0]
    assert export_main([str(tmp_path / "run"), str(tmp_path / "export")]) == 0
    after = load_file(tmp_path / "export" / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_what_does_not_fit_ends_the_job_in_one_line(
    config: Path, llama: Path, tmp_path: Path
) -> None:
    """Other sizes, another tokenizer, a damaged export or no folder: named before any step."""
    sizes = run_job(tmp_path, [*_arguments(config, llama), "model.layers=5"])
    assert sizes.codes == [2]
    assert len(sizes.errors) == 1
    assert "model.layers=5 must be 6; set them" in sizes.errors[0]

    text = (llama / "tokenizer.json").read_text().replace("<|endoftext|>", "<done>")
    (llama / "tokenizer.json").write_text(text)
    tokens = run_job(tmp_path, _arguments(config, llama))
    assert tokens.codes == [2]
    assert "is not the tokenizer of train.init_from" in tokens.errors[0]
    assert f"make the shards with --tokenizer {llama / 'tokenizer.json'}" in tokens.errors[0]

    shutil.rmtree(llama)
    gone = run_job(tmp_path, _arguments(config, llama))
    assert gone.codes == [2]
    assert f"{llama / 'config.json'} does not exist" in gone.errors[0]


def test_a_dry_run_looks_at_the_folder(
    config: Path, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says what would be taken, refuses what does not fit, and passes over what is elsewhere."""
    arguments = [*_arguments(config, llama), "model.vocab_size=264"]
    assert train_main([*arguments, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"weights from {llama}: 3 trunk layers and head 1\n" in out
    assert "the last 4 of 264 rows of embedding and unembedding are fresh" in out
    assert train_main([*arguments, "model.kv_heads=4", "--dry-run"]) == 2
    assert "model.kv_heads=4 must be 2" in capsys.readouterr().err
    assert train_main([*arguments, "train.init_from=/nonexistent/llama", "--dry-run"]) == 0
    assert "/nonexistent/llama: not on this machine" in capsys.readouterr().out
