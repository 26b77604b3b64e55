"""The class that an export carries for transformers: all heads, from the same plain folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from model.hugging_face.loading import load_export
from model.hugging_face.modeling_headway import HeadwayForCausalLM
from tests.support.tiny_export import VOCABULARY, export_tiny
from tests.support.tiny_model import head_logits

TOKENS = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
# fp32, logits up to 20; either side is up to 2.7e-5 from the same model in float64
TOLERANCE = 3e-5

# Run where nothing of this project can be imported.
_ELSEWHERE = """
import sys
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
folder, tokens = sys.argv[1], torch.load("tokens.pt")
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__name__ == "HeadwayForCausalLM", type(model)
plain = AutoModelForCausalLM.from_pretrained(folder)
assert type(plain) is LlamaForCausalLM, type(plain)
assert not any(name.partition(".")[0] in ("model", "pipeline") for name in sys.modules)
with torch.no_grad():
    heads, logits = model.all_head_logits(tokens), model(tokens).logits
    assert torch.equal(plain(tokens).logits, logits)
prompt = {"input_ids": tokens[:, :5], "attention_mask": torch.ones(2, 5, dtype=torch.long)}
settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
texts = [m.generate(**prompt, **settings, pad_token_id=0) for m in (model, plain)]
assert torch.equal(*texts)
assert torch.equal(texts[0], model.generate(**prompt, **settings, pad_token_id=0, num_heads=4))
sys.modules["model"] = None  # also where the project is installed beside it
try:
    model.generate(**prompt, **settings, decoder="beam")
except ImportError as error:
    said = str(error)
torch.save({"heads": heads, "logits": logits, "text": texts[0], "said": said}, "result.pt")
"""


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of four heads, in several files, that no test changes."""
    directory = tmp_path_factory.mktemp("exports") / "whole"
    export_tiny(directory, max_file_bytes=50_000)
    for stem in ("model", "extra_heads"):
        assert len(list(directory.glob(f"{stem}-*.safetensors"))) > 1
    return directory


@pytest.fixture
def copied(export: Path, tmp_path: Path) -> Path:
    """An export of the test's own."""
    return Path(shutil.copytree(export, tmp_path / "export"))


def _ours(directory: Path) -> Tensor:
    """`[B, S, n, V]` of our own model on the folder."""
    return head_logits(load_export(directory).model, TOKENS).permute(1, 2, 0, 3)


@torch.no_grad()
def _all_heads(model: HeadwayForCausalLM) -> Tensor:
    return model.all_head_logits(TOKENS)


def test_it_needs_nothing_but_transformers(export: Path, tmp_path: Path) -> None:
    """Offline and away from this project: all heads' logits, generation, and the plain Llama."""
    torch.save(TOKENS, tmp_path / "tokens.pt")
    environment = os.environ | {
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(Path(transformers.__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _ELSEWHERE, str(export)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(tmp_path / "result.pt")
    torch.testing.assert_close(found["heads"], _ours(export), rtol=0, atol=TOLERANCE)
    assert torch.equal(found["heads"][:, :, 0], found["logits"])
    assert found["text"].shape == (2, 17)
    assert found["said"].startswith("decoder needs Headway's packages, which are not all here (")
    assert "pip install -e CHECKOUT" in found["said"]


@pytest.mark.parametrize("future_tokens", [1, 2])
def test_any_number_of_heads_in_one_file(tmp_path: Path, future_tokens: int) -> None:
    """One head has no extra files; two have, and only the plain tensors stand in the Llama's index.

    Loaders that read every safetensors file of a folder keep to that index where there is one.
    """
    directory = tmp_path / "export"
    export_tiny(directory, future_tokens=future_tokens)
    model = HeadwayForCausalLM.from_pretrained(directory)
    torch.testing.assert_close(_all_heads(model), _ours(directory), rtol=0, atol=TOLERANCE)
    index = directory / "model.safetensors.index.json"
    assert (
        index.is_file() == (directory / "extra_heads.safetensors").is_file() == (future_tokens > 1)
    )
    if index.is_file():
        with safe_open(directory / "model.safetensors", framework="pt") as file:
            assert json.loads(index.read_text())["weight_map"].keys() == set(file.keys())


def test_padded_texts_and_the_last_positions(export: Path) -> None:
    """A text padded on the left has the logits it has alone."""
    model = HeadwayForCausalLM.from_pretrained(export)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), TOKENS], dim=1)
    mask = (torch.arange(43) >= 3).long().expand(2, 43)
    positions = (torch.arange(43) - 3).clamp(min=0).expand(2, 43)
    with torch.no_grad():
        found = model.all_head_logits(padded, mask, position_ids=positions)
    torch.testing.assert_close(found[:, 3:], _all_heads(model), rtol=0, atol=2 * TOLERANCE)


def test_a_cache_is_refused(export: Path) -> None:
    """Extra heads have no cache; being given one is an error, not a wrong answer."""
    model = HeadwayForCausalLM.from_pretrained(export)
    with torch.no_grad():
        cache = model(TOKENS[:, :4]).past_key_values
        with pytest.raises(ValueError, match="pass whole texts"):
            model.all_head_logits(TOKENS[:, 4:], past_key_values=cache)


def test_missing_heads_are_refused_where_they_are_wanted(copied: Path) -> None:
    """Without a head's tensors the class refuses; the plain Llama loads as ever."""
    index = copied / "all_heads.safetensors.index.json"
    lost = "extra_heads.3.mlp.up_proj.weight"
    path = copied / json.loads(index.read_text())["weight_map"][lost]
    save_file({k: v for k, v in load_file(path).items() if k != lost}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"lacks {lost} and 0 more"):
        HeadwayForCausalLM.from_pretrained(copied)
    for file in copied.glob("extra_heads*"):
        file.unlink()
    with pytest.raises(OSError, match="extra_heads"):
        HeadwayForCausalLM.from_pretrained(copied)
    index.unlink()
    with pytest.raises(ValueError, match=r"lacks extra_heads\.2"):
        HeadwayForCausalLM.from_pretrained(copied)
    assert type(AutoModelForCausalLM.from_pretrained(copied)) is LlamaForCausalLM


def test_what_transformers_saves_again_loads_again(export: Path, tmp_path: Path) -> None:
    """save_pretrained keeps all heads, in another type, too, and says which config it is of."""
    model, found = HeadwayForCausalLM.from_pretrained(
        export, output_loading_info=True, dtype=torch.bfloat16
    )
    assert not found["missing_keys"]
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "again")
    again = HeadwayForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    assert torch.equal(_all_heads(again), _all_heads(model))
    assert again.config.future_tokens == 4
