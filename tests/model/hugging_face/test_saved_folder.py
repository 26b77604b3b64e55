"""Folders that `save_pretrained` of the class with all heads wrote: loaded by it, and by us."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import LlamaForCausalLM

from model.errors import CheckpointError
from model.generate import main
from model.hugging_face.importing import LlamaFolder
from model.hugging_face.loading import load_export
from model.hugging_face.modeling_headway import HeadwayForCausalLM
from model.hugging_face.saved_folder import read_any_record
from tests.support.tiny_export import VOCABULARY, export_tiny
from tests.support.tiny_llama import fitting_config, imported_model
from tests.support.tiny_model import head_logits

TOKENS = torch.randint(VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
# fp32, logits up to 20: as much as our model and transformers' differ on any export
TOLERANCE = 3e-5

# Where nothing of this project can be imported: train on, merge an adapter as peft does (its
# product is added to the weight), save, load again.
_ELSEWHERE = """
import sys
import torch
from transformers import AutoModelForCausalLM
export, saved, tokens = sys.argv[1], sys.argv[2], torch.load("tokens.pt")
model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model.train()(tokens, labels=tokens).loss.backward()
optimizer.step()
torch.manual_seed(0)
for name, weight in model.eval().named_parameters():
    if "_proj" in name:
        adapter = torch.randn(weight.shape[0], 2), torch.randn(2, weight.shape[1])
        weight.data += 0.02 * adapter[0] @ adapter[1]
model.save_pretrained(saved)
again = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
assert type(again).__name__ == "HeadwayForCausalLM"
with torch.no_grad():
    logits = again.all_head_logits(tokens)
    assert torch.equal(logits, model.all_head_logits(tokens))
prompt = {"input_ids": tokens[:1, :5], "max_new_tokens": 12, "do_sample": False}
assert torch.equal(again.generate(**prompt), again.generate(**prompt, num_heads=4))
again.save_pretrained(saved + "-again")
torch.save(logits, "logits.pt")
"""


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four heads; no test changes it."""
    directory = tmp_path_factory.mktemp("exports") / "export"
    export_tiny(directory, max_file_bytes=50_000)
    return directory


def _save(export: Path, directory: Path, **settings: Any) -> HeadwayForCausalLM:
    """Save with changed heads, and the tokenizer beside it as its own save_pretrained would."""
    model = HeadwayForCausalLM.from_pretrained(export)
    with torch.no_grad():
        for number, head in model.extra_heads.items():
            head.mlp.down_proj.weight += 0.1 * int(number)
    model.save_pretrained(directory, **settings)
    if directory != export:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(export / name, directory / name)
    return model.eval()


@torch.no_grad()
def _logits(model: HeadwayForCausalLM) -> Tensor:
    """`[n, B, S, V]`."""
    return model.all_head_logits(TOKENS).permute(2, 0, 1, 3)


def test_it_goes_round_where_only_transformers_is(export: Path, tmp_path: Path) -> None:
    """Trained on and merged into, saved twice: class file and heads are there, and equal."""
    torch.save(TOKENS, tmp_path / "tokens.pt")
    environment = os.environ | {
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(Path(transformers.__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _ELSEWHERE, str(export), str(tmp_path / "saved")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    code = (export / "modeling_headway.py").read_bytes()
    for name in ("saved", "saved-again"):
        folder = tmp_path / name
        assert (folder / "modeling_headway.py").read_bytes() == code
        config = json.loads((folder / "config.json").read_text())
        assert config["auto_map"] == {"AutoModelForCausalLM": "modeling_headway.HeadwayForCausalLM"}
        shutil.copyfile(export / "tokenizer.json", folder / "tokenizer.json")
        ours = head_logits(load_export(folder).model, TOKENS).permute(1, 2, 0, 3)
        torch.testing.assert_close(ours, torch.load(tmp_path / "logits.pt"), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("settings", [{}, {"max_shard_size": "50KB"}], ids=["one file", "several"])
def test_our_loaders_take_all_heads_back(
    export: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """For decoding, for logits, and as the beginning of a run: the weights that were saved."""
    saved = _save(export, tmp_path / "saved", **settings)
    assert (tmp_path / "saved" / "model.safetensors").exists() == (not settings)
    loaded = load_export(tmp_path / "saved")
    torch.testing.assert_close(
        head_logits(loaded.model, TOKENS), _logits(saved), rtol=0, atol=TOLERANCE
    )
    before = load_export(export).record.description
    assert loaded.record.description == before.model_copy(update={"run": "saved", "step": 0})
    config = fitting_config(tmp_path / "saved", 4)
    begun = dict(imported_model(tmp_path / "saved", config).named_parameters())
    weights = dict(loaded.model.named_parameters())
    assert begun.keys() == weights.keys()
    assert all(torch.equal(begun[name], weights[name]) for name in weights)
    exported = dict(load_export(export).model.named_parameters())
    assert not torch.equal(
        *(one["heads.layers.3.block.mlp.linear_fc2.weight"] for one in (begun, exported))
    )


def test_the_type_that_was_saved(export: Path, tmp_path: Path) -> None:
    """Weights in bf16 are decoded with in bf16."""
    model = HeadwayForCausalLM.from_pretrained(export, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    assert read_any_record(tmp_path / "saved").description.dtype == "bf16"


def test_the_command_drafts_with_them(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`python -m model.generate` on the folder: the text of transformers, with all heads."""
    saved = _save(export, tmp_path / "saved")
    arguments = ["--prompt", "ab", "--max-new-tokens", "16", "--compare", "--ids"]
    assert main([str(tmp_path / "saved"), *arguments]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^4 heads: 16 tokens", out, re.M)
    prompt = load_export(export).tokenizer.encode("ab").ids
    text = saved.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)
    assert f"ids: {' '.join(map(str, text[0, len(prompt) :].tolist()))}\n" in out


def test_saving_over_an_export(export: Path, tmp_path: Path) -> None:
    """The folder then holds what was saved, not the heads that lay there before."""
    folder = Path(shutil.copytree(export, tmp_path / "export"))
    saved = _save(folder, folder)
    assert torch.equal(_logits(HeadwayForCausalLM.from_pretrained(folder).eval()), _logits(saved))
    torch.testing.assert_close(
        head_logits(load_export(folder).model, TOKENS), _logits(saved), rtol=0, atol=TOLERANCE
    )


def test_a_folder_without_the_heads(export: Path, tmp_path: Path) -> None:
    """Saved as a plain Llama it has none: said where they are wanted, else a Llama as any."""
    LlamaForCausalLM.from_pretrained(export).save_pretrained(tmp_path / "plain")
    shutil.copyfile(export / "tokenizer.json", tmp_path / "plain" / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"has 1 of the 4 heads .* trust_remote_code=True"):
        load_export(tmp_path / "plain")
    assert LlamaFolder(tmp_path / "plain").heads == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eos_token_id": None}, "has no number for eos_token_id, so no text would end"),
        ({"future_tokens": 10**9}, "is not of a model with 1000000000 heads (model.layers"),
        ({"max_position_embeddings": 0}, "is not of a model with 4 heads (sequence_length"),
        ({"future_tokens": "4"}, "is not an export with its heads"),
    ],
)
def test_settings_that_fit_no_model(
    export: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    """One line that names the file and what is wrong in it."""
    HeadwayForCausalLM.from_pretrained(export).save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=re.escape(words)):
        read_any_record(tmp_path / "saved")
