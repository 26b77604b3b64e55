"""The checks of a written export that hold one layer at a time: tensors, names, logits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import ModelConfig
from model.errors import CheckpointError
from model.hugging_face.folder import ExportDescription
from model.hugging_face.loading import DTYPES
from model.hugging_face.modeling_headway import HeadwayForCausalLM
from model.structure.sharding import placement_of, take_slice
from pipeline.checkpoint.sharded_tensors import Snapshot, StateFiles, run_key
from pipeline.exporting.layer_by_layer import compare_layers, logit_blocks
from pipeline.exporting.tensors import check_names, check_values
from pipeline.exporting.whole_model import head_logits, parity_tokens
from pipeline.exporting.writing import write_export
from tests.support.tiny_export import VOCABULARY, byte_tokenizer, describe
from tests.support.tiny_model import tiny_config, tiny_model, tiny_weights

SCALING = {"rope_type": "linear", "factor": 4.0}


class Exported:
    """A tiny checkpoint of two tensor-parallel ranks, and an export of it in many files."""

    def __init__(self, folder: Path, dtype: str = "fp32", **sizes: Any) -> None:
        self.folder = folder / "export"
        self.config: ModelConfig = tiny_config(vocab_size=VOCABULARY, rope_scaling=SCALING, **sizes)
        self.description: ExportDescription = describe(self.config, dtype=dtype)
        self.weights: dict[str, Tensor] = tiny_weights(self.config)
        for rank in range(2):
            runs = {
                run_key("weight", name, 0): take_slice(
                    weight, placement_of(name), rank, 2
                ).flatten()
                for name, weight in self.weights.items()
                if rank == 0 or placement_of(name).dim is not None
            }
            Snapshot(rank, rank, 2, 1, runs).write(folder / "weights")
        self.files = StateFiles(folder / "weights", self.config)
        write_export(
            self.folder,
            self.description,
            self.weights.items(),
            tokenizer=byte_tokenizer(),
            max_file_bytes=30_000,
        )

    def check(self) -> None:
        """Names, then values."""
        check_names(self.folder)
        check_values(self.folder, self.description, self.files)

    def change(self, name: str, tensor: Tensor | None, new_name: str | None = None) -> Tensor:
        """Write one tensor of the folder anew (None: take it out); gives what it was."""
        path = self.folder / self.index("all_heads")[name]
        tensors = load_file(path)
        before = tensors.pop(name)
        if tensor is not None:
            tensors[new_name or name] = tensor
        save_file(tensors, path)
        return before

    def read(self, name: str) -> Tensor:
        """A tensor of the folder."""
        return load_file(self.folder / self.index("all_heads")[name])[name]

    def index(self, kind: str) -> dict[str, str]:
        """The files by tensor that an index lists."""
        content = json.loads((self.folder / f"{kind}.safetensors.index.json").read_text())
        places: dict[str, str] = content["weight_map"]
        return places


@pytest.fixture
def exported(tmp_path: Path) -> Exported:
    """An export to damage."""
    return Exported(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "heads", "block_bytes"), [("fp32", 4, 10_000), ("bf16", 4, 1), ("fp32", 1, 1 << 26)]
)
def test_logits_are_those_of_whole_models(
    tmp_path: Path, dtype: str, heads: int, block_bytes: int
) -> None:
    """Both sides, layer by layer and in any blocks of rows, are what the whole models give."""
    case = Exported(tmp_path, dtype, future_tokens=heads)
    blocks = list(logit_blocks(case.folder, case.description, case.files, block_bytes=block_bytes))
    trained, written = (torch.cat(side, dim=-1) for side in zip(*blocks, strict=True))
    assert (len(blocks) > 1) == (block_bytes < 1 << 26)
    tokens = parity_tokens(case.description)
    rounded = {name: weight.to(DTYPES[dtype]) for name, weight in case.weights.items()}
    expected = head_logits(tiny_model(case.config, rounded, torch.float32), tokens)
    llama = HeadwayForCausalLM.from_pretrained(case.folder, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = llama.all_head_logits(tokens).permute(2, 0, 1, 3)
    limit = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(trained, expected, rtol=0, atol=limit)
    torch.testing.assert_close(written, theirs, rtol=0, atol=limit)
    case.check()
    parity = compare_layers(case.folder, case.description, case.files)
    assert parity.holds
    assert len(parity.all_heads) == heads
    assert parity.largest_logit == pytest.approx(float(expected.abs().max()), rel=1e-5)
    assert parity.summary().startswith("layer by layer: ")


@pytest.mark.parametrize(
    ("name", "hurt"),
    [
        ("model.embed_tokens.weight", {1, 2, 3, 4}),
        ("model.layers.1.mlp.up_proj.weight", {1, 2, 3, 4}),
        ("model.layers.2.self_attn.k_proj.weight", {1}),
        ("extra_heads.3.self_attn.v_proj.weight", {3}),
        ("extra_heads.4.post_attention_layernorm.weight", {4}),
        ("model.norm.weight", {1, 2, 3, 4}),
        ("lm_head.weight", {1, 2, 3, 4}),
    ],
)
def test_a_damaged_tensor_is_caught(exported: Exported, name: str, hurt: set[int]) -> None:
    """It is named, and by logits alone the heads that read it are told apart from the others."""
    exported.check()
    exported.change(name, exported.read(name).roll(1, 0))
    with pytest.raises(CheckpointError, match=rf"tensor {name} .* is not the checkpoint's"):
        exported.check()
    parity = compare_layers(exported.folder, exported.description, exported.files)
    assert not parity.holds
    limit = 1e-4 * parity.largest_logit
    assert {k for k, found in enumerate(parity.all_heads, 1) if found > limit} == hurt


def test_one_bit_and_what_is_no_number_are_caught(exported: Exported) -> None:
    """The last bit of a row that no compared token reads is found; so is NaN, on both sides."""
    name = "model.embed_tokens.weight"
    unread = next(k for k in range(VOCABULARY) if k not in parity_tokens(exported.description))
    changed = exported.read(name)
    changed.view(torch.int32)[unread, 0] ^= 1
    exported.change(name, changed)
    assert compare_layers(exported.folder, exported.description, exported.files).holds
    with pytest.raises(CheckpointError, match=rf"tensor {name}"):
        exported.check()
    exported.change("extra_heads.2.mlp.down_proj.weight", torch.full((32, 48), float("nan")))
    assert not compare_layers(exported.folder, exported.description, exported.files).holds


@pytest.mark.parametrize(
    ("change", "holds"),
    [({"rope_theta": 500.0}, False), ({"rms_norm_eps": 0.3}, False), ({"use_cache": False}, True)],
)
def test_settings_of_another_model_are_caught(
    exported: Exported, change: dict[str, float], holds: bool
) -> None:
    """Where config.json is wrong and every tensor right, only the logits can tell, and do."""
    path = exported.folder / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] |= {k: v for k, v in change.items() if k == "rope_theta"}
    path.write_text(json.dumps(config | change))
    exported.check()
    parity = compare_layers(exported.folder, exported.description, exported.files)
    assert parity.holds == holds


def test_tensors_that_transformers_would_not_find_are_named(exported: Exported) -> None:
    """One that is missing, renamed, of another shape, or left out of an index."""
    head, trunk = "extra_heads.2.mlp.down_proj.weight", "model.layers.0.input_layernorm.weight"
    before = exported.change(head, torch.ones(32, 47))
    with pytest.raises(CheckpointError, match=rf"{head} \(32, 47\) instead of \(32, 48\)"):
        exported.check()
    exported.change(head, before, "extra_heads.2.mlp.other")
    with pytest.raises(
        CheckpointError, match=rf"HeadwayForCausalLM.* {head} missing .*other \(32, 48\) instead"
    ):
        exported.check()
    exported.change(trunk, None)
    with pytest.raises(CheckpointError, match=rf"LlamaForCausalLM .*: {trunk} missing"):
        exported.check()


def test_an_index_without_a_tensor_is_caught(exported: Exported) -> None:
    """A head's only tensor of a file is in the file but not in the index of all heads."""
    path = exported.folder / "all_heads.safetensors.index.json"
    content = json.loads(path.read_text())
    file_name = content["weight_map"]["extra_heads.4.mlp.down_proj.weight"]
    listed = {name: file for name, file in content["weight_map"].items() if file != file_name}
    path.write_text(json.dumps(content | {"weight_map": listed}))
    with pytest.raises(CheckpointError, match=r"extra_heads\.4\..* missing instead of \("):
        exported.check()
    path.write_text("{}")
    with pytest.raises(CheckpointError, match=r"all_heads.* cannot be read"):
        exported.check()
