"""Headway's parameters as tensors of a Hugging Face Llama, and back: names and layouts, no files.

Trunk layers and the heads that the next token passes are the layers of a plain Llama, head 1 being
the last; other heads keep Llama's names within a layer, below `extra_heads.{k}`.

    trunk.layers.3.block.mlp.linear_fc1.weight  <->  model.layers.3.mlp.{gate,up}_proj.weight
    heads.layers.1.block...                     <->  model.layers.{last}...
    heads.layers.2.block...                     <->  extra_heads.2...

Further forms, by the keys of the model's configuration:

    head_kind: anticausal     heads n .. 1 are the last layers of the Llama, none is extra
    head_layers: 2            heads.layers.2.0.block..., heads.layers.2.1.block...
                              <-> extra_heads.2.0..., extra_heads.2.1...
    head_kind: linear         heads.layers.{k}.projection.weight <-> extra_heads.{k}.weight, but of
                              head 1 model.norm.projection.weight: it is no plain Llama
    memory: {...}             memory.initial, .summary, .query, .key keep their names
    lm_head: replicated       heads.readouts.{k}.unembedding.weight <-> extra_lm_heads.{k}.weight

Legend: A attention heads, G key-value heads, D head dimension, F feed-forward, H hidden.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.config import ModelConfig
from model.memory.sizes import MEMORY

EXTRA_HEADS = "extra_heads"
EXTRA_LM_HEADS = "extra_lm_heads"
LINEAR_HEAD_1 = "model.norm.projection.weight"

_OUTSIDE_LAYERS = {
    "trunk.embedding.weight": "model.embed_tokens.weight",
    "heads.readout.norm_weight": "model.norm.weight",
    "heads.readout.weight": "lm_head.weight",
}
_QKV = "self_attention.linear_qkv.weight"
_GATE_UP = "mlp.linear_fc1.weight"
_WITHIN_LAYER = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    _QKV: tuple(f"self_attn.{part}_proj.weight" for part in "qkv"),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
    _GATE_UP: ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
}


def hf_names(name: str, config: ModelConfig) -> tuple[str, ...]:
    """The Hugging Face tensors that a parameter becomes, in the order of `split`."""
    if name.startswith(MEMORY):
        return (name,)
    if name in _OUTSIDE_LAYERS:
        return (_OUTSIDE_LAYERS[name],)
    layer, _, rest = name.partition(".block.")
    if not rest:  # of one head, and no layer
        kind, number = name.split(".")[1:3]
        if kind == "layers" and number == "1":
            return (LINEAR_HEAD_1,)
        return (f"{EXTRA_LM_HEADS if kind == 'readouts' else EXTRA_HEADS}.{number}.weight",)
    part, _, number = layer.partition(".layers.")
    if part == "trunk":
        prefix = f"model.layers.{number}"
    else:
        head, _, index = number.partition(".")
        prefix = head_prefixes(int(head), config)[int(index or 0)]
    return tuple(f"{prefix}.{suffix}" for suffix in _WITHIN_LAYER[rest])


def head_prefixes(head: int, config: ModelConfig) -> list[str]:
    """Where each layer of a head lies, in the order in which they are computed."""
    each, passed = config.layers_per_head, config.next_token_heads
    if head in passed:
        first = config.trunk_layers + passed.index(head) * each
        return [f"model.layers.{index}" for index in range(first, first + each)]
    if each == 1:
        return [f"{EXTRA_HEADS}.{head}"]
    return [f"{EXTRA_HEADS}.{head}.{index}" for index in range(each)]


def layers_from_llama(llama: int, config: ModelConfig) -> int:
    """L of a model of this one's heads whose next-token model has so many layers."""
    return llama + config.layers - config.next_token_layers


def is_extra(hf_name: str) -> bool:
    """Whether a tensor is of no use to the next token."""
    return hf_name.startswith((f"{EXTRA_HEADS}.", f"{EXTRA_LM_HEADS}."))


def split(name: str, tensor: Tensor, config: ModelConfig) -> tuple[Tensor, ...]:
    """The tensors of `hf_names(name)` from the parameter.

    Example: 4 queries in 2 groups, `linear_qkv` rows (each D wide) q0 q1 k0 v0 q2 q3 k1 v1 become
    q_proj = q0 q1 q2 q3, k_proj = k0 k1, v_proj = v0 v1.
    """
    if name.endswith(_GATE_UP):
        return tuple(tensor.chunk(2))
    if not name.endswith(_QKV):
        return (tensor,)
    hidden = tensor.shape[1]
    groups = tensor.view(config.kv_heads, -1, config.head_dim, hidden)
    parts = groups.split([groups.shape[1] - 2, 1, 1], dim=1)
    return tuple(part.reshape(-1, hidden) for part in parts)


def join(name: str, parts: Sequence[Tensor], config: ModelConfig) -> Tensor:
    """The parameter from the tensors of `hf_names(name)`; inverse of `split`."""
    if not name.endswith(_QKV):
        return torch.cat(list(parts)) if len(parts) > 1 else parts[0]
    hidden = parts[0].shape[1]
    groups = [part.view(config.kv_heads, -1, config.head_dim, hidden) for part in parts]
    return torch.cat(groups, dim=1).reshape(-1, hidden)


def hf_shapes(name: str, shape: tuple[int, ...], config: ModelConfig) -> list[tuple[int, ...]]:
    """Shapes of the tensors of `hf_names(name)`, given the parameter's shape."""
    return [tuple(part.shape) for part in split(name, torch.empty(shape, device="meta"), config)]
