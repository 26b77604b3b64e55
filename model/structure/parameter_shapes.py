"""Names and whole shapes of a model's parameters, from its sizes alone.

Legend: V vocabulary, H hidden, F feed-forward, A attention heads, G key-value heads, D head
dimension.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from model.config import ModelConfig
from model.errors import CheckpointError
from model.memory.adapters import with_adapters
from model.memory.sizes import MEMORY, memory_shapes

if TYPE_CHECKING:  # plans and configurations need no torch
    from torch import Tensor

_HEAD = re.compile(r"heads\.(?:layers|readouts)\.(\d+)\.")

# A linear head's parameter.
LINEAR = "projection.weight"


def head_of(name: str) -> int:
    """Number of the head that a parameter belongs to alone; 0 for trunk and LM head.

    What stands for the head in the name is `heads.layers.2` or, for an unembedding of its own,
    `heads.readouts.2`.
    """
    match = _HEAD.match(name)
    return int(match[1]) if match else 0


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of the whole model, in the model's own order.

    What a checkpoint or an export must hold, each name once; tensor-parallel ranks hold slices of
    these (`model.structure.sharding`).
    """
    vocabulary, hidden = config.vocab_size, config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"trunk.embedding.weight": (vocabulary, hidden)}
    adapter_rank = 0 if config.memory is None else config.memory.adapter_rank
    for layer in layer_names(config):
        own = with_adapters(layer_shapes(config), adapter_rank if layer.startswith("trunk") else 0)
        shapes |= {f"{layer}.{name}": shape for name, shape in own}
    heads = range(1, config.future_tokens + 1)
    if config.head_kind == "linear":
        shapes |= {f"heads.layers.{head}.{LINEAR}": (hidden, hidden) for head in heads}
    shapes["heads.readout.weight"] = (vocabulary, hidden)
    shapes["heads.readout.norm_weight"] = (hidden,)
    if config.lm_head == "replicated":
        shapes |= {own_unembedding(head): (vocabulary, hidden) for head in heads[1:]}
    if config.memory is not None:
        shapes |= {
            f"{MEMORY}{name}": shape for name, shape in memory_shapes(config.memory, hidden).items()
        }
    return shapes


def layer_names(config: ModelConfig) -> Iterator[str]:
    """The transformer layers: those of the trunk from 0, then those of the heads from 1."""
    for index in range(config.trunk_layers):
        yield f"trunk.layers.{index}.block"
    for head in range(1, config.future_tokens + 1):
        yield from head_layer_names(config, head)


def head_layer_names(config: ModelConfig, head: int) -> list[str]:
    """The transformer layers of one head, in the order in which they are computed."""
    if config.layers_per_head == 1:
        return [f"heads.layers.{head}.block"]
    return [f"heads.layers.{head}.{index}.block" for index in range(config.layers_per_head)]


def own_unembedding(head: int) -> str:
    """The unembedding of a head from 2 on under a replicated LM head; head 1 has the LM head's."""
    return f"heads.readouts.{head}.unembedding.weight"


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The parameters within one layer.

    `linear_qkv` holds for each of the G groups its A/G queries, then its key, then its value, D
    rows each; `linear_fc1` holds gate above up.
    """
    hidden, ffn = config.hidden_size, config.ffn_hidden_size
    qkv = (config.attention_heads + 2 * config.kv_heads) * config.head_dim
    return {
        "input_layernorm.weight": (hidden,),
        "self_attention.linear_proj.weight": (hidden, config.attention_heads * config.head_dim),
        "self_attention.linear_qkv.weight": (qkv, hidden),
        "pre_mlp_layernorm.weight": (hidden,),
        "mlp.linear_fc1.weight": (2 * ffn, hidden),
        "mlp.linear_fc2.weight": (hidden, ffn),
    }


def checked_parameters(
    weights: "Iterable[tuple[str, Tensor]]", config: ModelConfig, origin: Path
) -> "Iterator[tuple[str, Tensor]]":
    """Pass whole parameters through, checking that all of the model's come, each exactly once.

    Args:
        weights: names and whole tensors, in any order.
        config: sizes of the model they must be of.
        origin: where they come from, for messages.

    Raises:
        CheckpointError: a name is unknown, comes twice or is missing, or a shape is not the
            model's; the last of these when `weights` is exhausted.
    """
    missing = parameter_shapes(config)
    for name, tensor in weights:
        shape = missing.pop(name, None)
        if shape is None:
            known = name in parameter_shapes(config)
            raise CheckpointError(
                f"{origin}: parameter {name} "
                + ("comes twice" if known else "is not one of this model's")
                + "; use a checkpoint of this model"
            )
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{origin}: parameter {name} has shape {tuple(tensor.shape)}, the model's sizes "
                f"give {shape}; use a checkpoint of this model"
            )
        yield name, tensor
    if missing:
        raise CheckpointError(
            f"{origin}: parameter {next(iter(missing))} is missing"
            + (f", and {len(missing) - 1} more" if len(missing) > 1 else "")
            + "; use a complete checkpoint of this model"
        )
