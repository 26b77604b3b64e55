"""Bytes that a layer keeps for backward, counted from what each of its parts saves.

For each token, in elements, on each of t tensor-parallel ranks:

    whole on every rank    4 H            inputs and outputs of both norms (the residual stream is
                                          the norms' input)
    split over the ranks   2 H + 2 G D    queries, keys, values, what attention gave
                           3 f            gate, up, and their product

besides 4 bytes (8 in float64) for each norm and each attention head. With recomputation of the
layer only its input is left, H; with that of the core attention alone, the bytes for each head
go: the kernels keep no scores.

Legend: H hidden, A attention heads, G key-value heads, D head dimension, f feed-forward width,
t tensor-parallel size.
"""

from typing import Literal

from model.config import ModelConfig


def layer_activation_bytes(
    config: ModelConfig,
    *,
    tokens: int,
    checkpointing: Literal["none", "full", "selective"],
    tensor_size: int = 1,
    element_bytes: int = 2,
) -> float:
    """Bytes a rank keeps between a layer's forward and its backward.

    Example: a layer of 4,096 with 32 heads and feed-forward width 11,008 keeps 65,792 elements
    of a token and 136 bytes, 0.5 GiB of a sequence of 4,096 in bf16.

    Args:
        config: sizes.
        tokens: of a micro-batch.
        checkpointing: as `train.activation_checkpointing`.
        tensor_size: t.
        element_bytes: of activations.
    """
    hidden = config.hidden_size
    if checkpointing == "full":
        return float(tokens * hidden * element_bytes)
    statistic = max(element_bytes, 4)
    keys_and_values = 2 * config.kv_heads * config.head_dim
    split = (2 * hidden + keys_and_values + 3 * config.ffn_hidden_size) * element_bytes
    if checkpointing == "none":
        split += config.attention_heads * statistic
    whole = 4 * hidden * element_bytes + 2 * statistic
    return tokens * (whole + split / tensor_size)
