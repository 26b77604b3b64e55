"""The weights that decoding computes with, fused and stacked, from tensors under Llama's names.

Queries are kept in the order (R, G) instead of Llama's (G, R), and the rows of the output matrix
likewise: then the queries of a group are so many more positions of one attention, and keys and
values need no copy for each of them.

Matrices are as `model.inference.products` wants them, with their inputs as rows.

Legend: H hidden, A attention heads, G key-value heads, R = A / G, D head dimension, F feed-forward,
V vocabulary, n heads of the model.
"""

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from model.config import ModelConfig
from model.hugging_face.names import (
    EXTRA_HEADS,
    EXTRA_LM_HEADS,
    LINEAR_HEAD_1,
    head_prefixes,
)
from model.inference.norm import RMSNorm
from model.inference.products import Matrices, Matrix, pack, pack_each
from model.memory.prompts import MemoryWeights
from model.memory.sizes import MEMORY, memory_shapes

Read = Callable[[str], Tensor]
AnyMatrix = TypeVar("AnyMatrix", Tensor, Matrix)


class LayerWeights(NamedTuple, Generic[AnyMatrix]):
    """One layer of the trunk; its matrices are tensors until they are packed.

    Attributes:
        attention_norm: `[H]`.
        qkv: `[H, (A + 2G) * D]`, queries before keys before values.
        output: `[A * D, H]`.
        mlp_norm: `[H]`.
        gate_up: `[H, 2F]`.
        down: `[F, H]`.
    """

    attention_norm: Tensor
    qkv: AnyMatrix
    output: AnyMatrix
    mlp_norm: Tensor
    gate_up: AnyMatrix
    down: AnyMatrix


class HeadWeights(NamedTuple):
    """The n heads side by side.

    Attributes:
        attention_norm: `[n, 1, H]`.
        query: `[n, H, A * D]`.
        key_value: `[n, H, 2 * G * D]`.
        output: `[n, A * D, H]`.
        mlp_norm: `[n, 1, H]`.
        gate_up: `[n, H, 2F]`.
        down: `[n, F, H]`.
    """

    attention_norm: Tensor
    query: Matrices
    key_value: Matrices
    output: Matrices
    mlp_norm: Tensor
    gate_up: Matrices
    down: Matrices

    def between(self, first: int, last: int) -> "HeadWeights":
        """Views of heads `first` .. `last`, from 1."""
        some = slice(first - 1, last)
        return HeadWeights(
            attention_norm=self.attention_norm[some],
            query=self.query[some],
            key_value=self.key_value[some],
            output=self.output[some],
            mlp_norm=self.mlp_norm[some],
            gate_up=self.gate_up[some],
            down=self.down[some],
        )


class SerialHeads(NamedTuple):
    """Heads that are several layers, or that read one another: layers as the trunk's.

    Attributes:
        layers: by number of the head, its layers in the order in which they are computed.
    """

    layers: dict[int, tuple[LayerWeights[Matrix], ...]]


class LinearHeads(NamedTuple):
    """Heads that are one matrix each.

    Attributes:
        maps: `[n, H, H]`.
    """

    maps: Matrices


AnyHeads = HeadWeights | SerialHeads | LinearHeads


class NetworkWeights(NamedTuple):
    """All weights.

    Attributes:
        embedding: `[V, H]`.
        trunk: its layers, from the first.
        heads: heads 1 .. n.
        norm: `[H]`, final norm.
        unembedding: `[H, V]`; of head 1 where each has its own.
        own_unembeddings: `[n, H, V]` where each head has its own.
        memory: of a model that has one.
    """

    embedding: Tensor
    trunk: tuple[LayerWeights[Matrix], ...]
    heads: AnyHeads
    norm: Tensor
    unembedding: Matrix
    own_unembeddings: Matrices | None = None
    memory: MemoryWeights | None = None


def read_weights(
    config: ModelConfig, read: Read, dtype: torch.dtype, device: torch.device
) -> NetworkWeights:
    """Read every tensor once and put it where decoding wants it.

    Args:
        config: sizes.
        read: a tensor of the export, by its Hugging Face name, in any floating type.
        dtype: to compute in.
        device: to compute on.
    """

    def place(name: str) -> Tensor:
        return read(name).to(device, dtype)

    prefixes = [f"model.layers.{index}" for index in range(config.trunk_layers)]
    norm = RMSNorm(config.hidden_size, config.norm_eps, dtype, device)
    return NetworkWeights(
        embedding=place("model.embed_tokens.weight"),
        trunk=read_layers(config, read, prefixes, dtype, device),
        heads=_read_heads(config, norm, place),
        norm=norm.prepare(place("model.norm.weight")),
        unembedding=pack(place("lm_head.weight").t().contiguous()),
        own_unembeddings=_read_unembeddings(config, place),
        memory=_read_memory(config, place),
    )


def read_layers(
    config: ModelConfig,
    read: Read,
    prefixes: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[LayerWeights[Matrix], ...]:
    """The layers whose tensors' names begin so; arguments as in `read_weights`."""
    norm = RMSNorm(config.hidden_size, config.norm_eps, dtype, device)

    def place(name: str) -> Tensor:
        return read(name).to(device, dtype)

    return tuple(_packed(_layer(config, norm, place, prefix)) for prefix in prefixes)


def _read_heads(config: ModelConfig, norm: RMSNorm, place: Read) -> AnyHeads:
    numbers = range(1, config.future_tokens + 1)
    if config.head_kind == "linear":
        names = [LINEAR_HEAD_1 if head == 1 else f"{EXTRA_HEADS}.{head}.weight" for head in numbers]
        return LinearHeads(pack_each(torch.stack([place(name).t() for name in names])))
    layers = {
        head: [_layer(config, norm, place, prefix) for prefix in head_prefixes(head, config)]
        for head in numbers
    }
    if config.head_kind == "parallel" and config.head_layers == 1:
        return _stack(config, [layers[head][0] for head in numbers])
    return SerialHeads({head: tuple(map(_packed, layers[head])) for head in numbers})


def _read_unembeddings(config: ModelConfig, place: Read) -> Matrices | None:
    if config.lm_head == "shared":
        return None
    names = [f"{EXTRA_LM_HEADS}.{head}.weight" for head in range(2, config.future_tokens + 1)]
    return pack_each(torch.stack([place(name).t() for name in ("lm_head.weight", *names)]))


def _read_memory(config: ModelConfig, place: Read) -> MemoryWeights | None:
    if config.memory is None:
        return None
    names = memory_shapes(config.memory, config.hidden_size)
    return MemoryWeights(*(place(f"{MEMORY}{name}") for name in names))


def _layer(config: ModelConfig, norm: RMSNorm, place: Read, prefix: str) -> LayerWeights[Tensor]:
    groups, dim, hidden = config.kv_heads, config.head_dim, config.hidden_size
    query = place(f"{prefix}.self_attn.q_proj.weight").view(groups, -1, dim, hidden)
    key = place(f"{prefix}.self_attn.k_proj.weight")
    value = place(f"{prefix}.self_attn.v_proj.weight")
    output = place(f"{prefix}.self_attn.o_proj.weight").view(hidden, groups, -1, dim)
    gate = place(f"{prefix}.mlp.gate_proj.weight")
    up = place(f"{prefix}.mlp.up_proj.weight")
    return LayerWeights(
        attention_norm=norm.prepare(place(f"{prefix}.input_layernorm.weight")),
        qkv=torch.cat([query.transpose(0, 1).reshape(-1, hidden), key, value]).t().contiguous(),
        output=output.permute(2, 1, 3, 0).reshape(-1, hidden).contiguous(),
        mlp_norm=norm.prepare(place(f"{prefix}.post_attention_layernorm.weight")),
        gate_up=torch.cat([gate, up]).t().contiguous(),
        down=place(f"{prefix}.mlp.down_proj.weight").t().contiguous(),
    )


def _packed(layer: LayerWeights[Tensor]) -> LayerWeights[Matrix]:
    return LayerWeights(
        attention_norm=layer.attention_norm,
        qkv=pack(layer.qkv),
        output=pack(layer.output),
        mlp_norm=layer.mlp_norm,
        gate_up=pack(layer.gate_up),
        down=pack(layer.down),
    )


def _stack(config: ModelConfig, layers: list[LayerWeights[Tensor]]) -> HeadWeights:
    width = config.attention_heads * config.head_dim
    return HeadWeights(
        attention_norm=torch.stack([layer.attention_norm for layer in layers]).unsqueeze(1),
        query=pack_each(torch.stack([layer.qkv[:, :width] for layer in layers])),
        key_value=pack_each(torch.stack([layer.qkv[:, width:] for layer in layers])),
        output=pack_each(torch.stack([layer.output for layer in layers])),
        mlp_norm=torch.stack([layer.mlp_norm for layer in layers]).unsqueeze(1),
        gate_up=pack_each(torch.stack([layer.gate_up for layer in layers])),
        down=pack_each(torch.stack([layer.down for layer in layers])),
    )
