"""Import: a Hugging Face Llama becomes trunk and head 1, and comes out again as it was."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from model.config import ModelConfig
from model.errors import CheckpointError, ConfigError
from model.hugging_face.importing import ImportedWeights, LlamaFolder
from model.hugging_face.loading import load_export
from model.structure.parameter_shapes import parameter_shapes
from model.structure.sharding import merge_slices, placement_of
from pipeline.exporting.writing import write_export
from tests.support.hostile import check_message
from tests.support.tiny_export import byte_tokenizer, describe, export_tiny
from tests.support.tiny_llama import (
    LAYERS,
    LLAMA3,
    VOCABULARY,
    fitting_config,
    fresh,
    imported_model,
    save_llama,
)
from tests.support.tiny_model import head_logits

TOKENS = torch.randint(VOCABULARY, (2, 60), generator=torch.Generator().manual_seed(0))
# fp32, logits up to 5, other orders of sums and products
TOLERANCE = 2e-5
HEAD_1, HEAD_2, HEAD_3 = (f"heads.layers.{k}.block.mlp.linear_fc1.weight" for k in (1, 2, 3))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that no test changes."""
    directory = tmp_path_factory.mktemp("llama") / "plain"
    save_llama(directory, rope=LLAMA3)
    return directory


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    """A folder of the test's own."""
    return Path(shutil.copytree(llama, tmp_path / "llama"))


def _edit(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@torch.no_grad()
def _logits(llama: LlamaForCausalLM) -> Tensor:
    logits: Tensor = llama(TOKENS, use_cache=False).logits
    return logits


KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope": {"rope_type": "linear", "factor": 2.0}},
    "llama3": {"rope": LLAMA3},
    "tied-sharded": {"tie_word_embeddings": True, "shard_size": "20KB"},
    "all-kv-heads": {"num_key_value_heads": 4},
    "bf16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("future_tokens", [1, 3])
def test_it_is_the_same_model_and_comes_out_as_it_went_in(
    kind: dict[str, Any], future_tokens: int, tmp_path: Path
) -> None:
    """Head 1 has transformers' logits; exported again, every tensor is equal bit by bit."""
    save_llama(tmp_path / "llama", **kind)
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
    expected = _logits(llama)
    config = fitting_config(tmp_path / "llama", future_tokens)
    assert config.trunk_layers == LAYERS - 1
    model = imported_model(tmp_path / "llama", config)
    ours = head_logits(model, TOKENS)
    torch.testing.assert_close(ours[0], expected, rtol=0, atol=TOLERANCE)
    assert all(torch.equal(logits, ours[0]) for logits in ours), "copied heads differ from head 1"

    dtype = "bf16" if kind.get("dtype") is torch.bfloat16 else "fp32"
    write_export(
        tmp_path / "export",
        describe(config, dtype=dtype),
        model.named_parameters(),
        tokenizer=byte_tokenizer(),
    )
    before = {
        name: tensor
        for path in (tmp_path / "llama").glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    after = load_file(tmp_path / "export" / "model.safetensors")
    if kind.get("tie_word_embeddings"):  # an export is never tied
        before["lm_head.weight"] = before["model.embed_tokens.weight"]
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    assert torch.equal(_logits(again), expected)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_theta": 500, "rope_scaling": {**LLAMA3, "factor": 8}},
        {"rope_theta": 500.0, "rope_scaling": None},
    ],
)
def test_files_of_transformers_4_are_read(copied: Path, rope: dict[str, Any]) -> None:
    """The older keys, rope_theta and rope_scaling, mean what transformers takes them for."""
    content = json.loads((copied / "config.json").read_text())
    del content["rope_parameters"]
    (copied / "config.json").write_text(json.dumps(content | rope))
    model = imported_model(copied, fitting_config(copied, 1))
    expected = _logits(AutoModelForCausalLM.from_pretrained(copied))
    torch.testing.assert_close(head_logits(model, TOKENS)[0], expected, rtol=0, atol=TOLERANCE)


def test_new_heads_can_start_fresh(llama: Path) -> None:
    """With init_heads=fresh heads 2 and up are an untrained model's, all else is the file's."""
    config = fitting_config(llama, 3)
    copies = dict(imported_model(llama, config).named_parameters())
    model = imported_model(llama, config, new_heads="fresh")
    for name, parameter in model.named_parameters():
        untrained = fresh(name, tuple(parameter.shape), config)
        of_a_new_head = name.startswith(("heads.layers.2", "heads.layers.3"))
        assert torch.equal(parameter, untrained if of_a_new_head else copies[name]), name
    assert torch.equal(copies[HEAD_2], copies[HEAD_1])


def test_all_heads_of_an_export_are_taken(tmp_path: Path) -> None:
    """Of our own export every head comes back; one more is a copy of head 1, one less is left."""
    weights = export_tiny(tmp_path / "export", max_file_bytes=50_000)  # 2 trunk layers, 4 heads
    same = dict(imported_model(tmp_path / "export", _tiny(tmp_path, 4)).named_parameters())
    assert same.keys() == weights.keys()
    assert all(torch.equal(same[name], tensor) for name, tensor in weights.items())
    more = dict(imported_model(tmp_path / "export", _tiny(tmp_path, 5)).named_parameters())
    assert torch.equal(more[HEAD_3], weights[HEAD_3])
    assert torch.equal(more[HEAD_3.replace("3", "5", 1)], weights[HEAD_1])
    fewer = dict(imported_model(tmp_path / "export", _tiny(tmp_path, 2)).named_parameters())
    assert torch.equal(fewer[HEAD_2], weights[HEAD_2])
    assert HEAD_3 not in fewer


def _tiny(folder: Path, heads: int) -> ModelConfig:
    return fitting_config(folder / "export", heads)


def test_a_damaged_export_is_found(tmp_path: Path) -> None:
    """Our exports have checksums; a changed bit of any file is refused with the file's name."""
    export_tiny(tmp_path / "export")
    folder = LlamaFolder(tmp_path / "export")
    folder.verify()
    path = tmp_path / "export" / "extra_heads.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"extra_heads\.safetensors is damaged"):
        folder.verify()


def _rows(rows: Tensor | None) -> Callable[[], Tensor]:
    """What fills up an embedding; nothing else may ask for it."""

    def fresh_rows() -> Tensor:
        assert rows is not None
        return rows.clone()

    return fresh_rows


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_rank_takes_its_slice(tmp_path: Path, tied: bool, size: int) -> None:
    """Slices of all ranks make the whole, with a vocabulary padded past the last rank's rows."""
    save_llama(tmp_path / "llama", num_key_value_heads=4, tie_word_embeddings=tied)
    padded = VOCABULARY + 100  # over 4 ranks, the last rank has fresh rows only
    config = fitting_config(tmp_path / "llama", 2, vocab_size=padded)
    folder = LlamaFolder(tmp_path / "llama")
    folder.check(config)
    imported = [
        ImportedWeights(folder, config, tensor_rank=rank, tensor_size=size) for rank in range(size)
    ]
    whole = dict(imported_model(tmp_path / "llama", config).named_parameters())
    for name, shape in parameter_shapes(config).items():
        placement = placement_of(name)
        untrained = fresh(name, shape, config)
        local = list(shape)
        if placement.dim is not None:
            local[placement.dim] //= size
        parts = []
        for rank, weights in enumerate(imported):
            rows = untrained.narrow(0, rank * local[0], local[0]) if shape[0] == padded else None
            parts.append(weights(name, _rows(rows)))
            assert list(parts[-1].shape) == local
            assert parts[-1].dtype == torch.float32
        assert torch.equal(merge_slices(parts, placement), whole[name]), name
        if shape[0] == padded:
            assert torch.equal(whole[name][VOCABULARY:], untrained[VOCABULARY:])
            assert not torch.equal(whole[name][:VOCABULARY], untrained[:VOCABULARY])


def test_every_key_that_differs_is_named(llama: Path) -> None:
    """One line with all keys, their values here and there, and the options that fix them."""
    config = ModelConfig(
        layers=9,
        hidden_size=64,
        attention_heads=8,
        vocab_size=200,
        future_tokens=2,
        rope_theta=10000.0,
    )
    with pytest.raises(ConfigError) as caught:
        LlamaFolder(llama).check(config)
    message = str(caught.value)
    assert "\n" not in message
    assert "4 layers, so trunk and 2 heads make 5" in message
    for words in (
        "model.layers=9 must be 5",
        "model.hidden_size=64 must be 32",
        "model.attention_heads=8 must be 4",
        "model.kv_heads=8 must be 2",
        "model.ffn_hidden_size=256 must be 48",
        "model.rope_theta=10000.0 must be 500.0",
        "model.rope_scaling=null must be {rope_type: llama3, factor: 8.0",
        "model.norm_eps=1e-05 must be 2e-05",
        "model.vocab_size=200 must be 260",
        "--set model.layers=5 model.hidden_size=32",
        "'model.rope_scaling={rope_type: llama3, factor: 8.0",
    ):
        assert words in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mistral"}, 'model_type is "mistral", must be "llama"'),
        ({"attention_bias": True}, "attention_bias is true, must be false"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu", must be "silu"'),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set, must be null"),
        ({"head_dim": 16}, "head_dim=16, which is not hidden_size / num_attention_heads = 32 / 4"),
        ({"hidden_size": None}, "no number for hidden_size"),
        ({"num_hidden_layers": 1}, "leaves no trunk"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn'; default"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "rope_scaling.factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"head_dim": "8" * 10}, "head_dim=8888888888, which is not hidden_size"),
        ({"num_hidden_layers": 2.5}, "no number for num_hidden_layers"),
        ({"hidden_size": True}, "no number for hidden_size"),
        ({"rope_parameters": ["llama3"]}, "rope_type=['llama3']; default"),
        ({"rope_parameters": "linear"}, "rope_scaling.factor"),
        ({"rope_parameters": {"rope_theta": "big"}}, "no number for rope_theta"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 1e308}}, "rope_scaling.factor"),
        ({"model_type": ["x" * 5000]}, "..., must be"),
        ({"vocab_size": 1 << 63}, "a number does not fit into 64 bits"),
    ],
)
def test_what_is_no_plain_llama_is_refused(
    copied: Path, change: dict[str, Any], words: str
) -> None:
    """Another architecture, odd heads or an unknown scaling is named, in one line."""
    _edit(copied, **change)
    with pytest.raises(ConfigError) as caught:
        LlamaFolder(copied)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def _refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        LlamaFolder(directory).check(fitting_config(directory, 2))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_incomplete_and_foreign_files_are_refused(copied: Path) -> None:
    """A tensor that is missing, too many, of wrong shape or not a float is named."""
    path = copied / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"

    def rewritten(changed: dict[str, Tensor]) -> str:
        save_file(changed, path)
        return _refusal(copied)

    less = {key: value for key, value in tensors.items() if key != name}
    assert f"tensor {name} is missing" in rewritten(less)
    assert f"{name} has shape (47, 32)" in rewritten(tensors | {name: tensors[name][1:].clone()})
    assert "stored as I8" in rewritten(tensors | {name: tensors[name].to(torch.int8)})
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}
    assert "q_proj.bias is not a plain Llama's" in rewritten(tensors | bias)
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, path)
    LlamaFolder(copied).check(fitting_config(copied, 2))  # a buffer of older files, no stranger
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        LlamaFolder(copied)
    path.unlink()
    with pytest.raises(CheckpointError, match="save_pretrained"):
        LlamaFolder(copied)
    (copied / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        LlamaFolder(copied)


def test_a_memory_of_another_width_or_for_no_memory_says_what_to_set(copied: Path) -> None:
    """Nothing is wrong with the folder then, so no whole model is asked for."""
    path = copied / "model.safetensors"
    hidden = fitting_config(copied, 2).hidden_size
    memory = {"initial": torch.zeros(1, hidden), "summary": torch.zeros(1, hidden)}
    memory |= {name: torch.zeros(5, hidden) for name in ("query", "key")}
    save_file(load_file(path) | {f"memory.{name}": held for name, held in memory.items()}, path)
    LlamaFolder(copied).check(fitting_config(copied, 2, memory={"segment": 8, "width": 5}))
    with pytest.raises(ConfigError, match=r"set model\.memory\.width=5$"):
        LlamaFolder(copied).check(fitting_config(copied, 2, memory={"segment": 8, "width": 7}))
    assert _refusal(copied).endswith("or set model.memory as its config.json has it")


def test_a_missing_shard_and_a_damaged_index_are_named(tmp_path: Path) -> None:
    """Of several files the one that is gone is named; so is an index that cannot be read."""
    save_llama(tmp_path / "llama", shard_size="20KB")
    gone = sorted((tmp_path / "llama").glob("model-*.safetensors"))[2]
    gone.unlink()
    with pytest.raises(CheckpointError, match=f"{gone.name} is missing"):
        LlamaFolder(tmp_path / "llama")
    (tmp_path / "llama" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"index\.json cannot be read"):
        LlamaFolder(tmp_path / "llama")


def test_rope_scaling_survives_our_own_folder(tmp_path: Path) -> None:
    """An export of a model with scaled frequencies loads with them."""
    save_llama(tmp_path / "llama", rope=LLAMA3)
    config = fitting_config(tmp_path / "llama", 2)
    model = imported_model(tmp_path / "llama", config)
    write_export(
        tmp_path / "export",
        describe(config),
        model.named_parameters(),
        tokenizer=byte_tokenizer(),
    )
    loaded = load_export(tmp_path / "export").model
    assert loaded.config.rope_scaling == config.rope_scaling
    assert torch.equal(head_logits(loaded, TOKENS), head_logits(model, TOKENS))


@pytest.mark.parametrize(
    "weight_map",
    [
        {"a": "../secret.safetensors"},
        {"a": "/etc/passwd"},
        {"a": "x\0y"},
        {"a": ["b"]},
        {"a": 1},
        ["a"],
        "a",
        None,
    ],
)
def test_the_index_names_files_beside_it(tmp_path: Path, weight_map: object) -> None:
    """Paths, and what is no name at all, are not looked for."""
    save_llama(tmp_path / "llama", shard_size="20KB")
    index = tmp_path / "llama" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"index\.json cannot be read \(it ") as caught:
        LlamaFolder(tmp_path / "llama")
    check_message(str(caught.value))


def test_files_of_the_hubs_cache_are_links(tmp_path: Path) -> None:
    """The hub's library keeps a model's files elsewhere, and links to them."""
    save_llama(tmp_path / "llama")
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "llama").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    folder = LlamaFolder(tmp_path / "snapshot")
    folder.check(fitting_config(tmp_path / "snapshot", 2))
