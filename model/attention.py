"""Core attention on torch's scaled_dot_product_attention, in the place of megatron's.

Megatron's `DotProductAttention` needs CUDA and materialises the scores. This one runs torch's flash
kernels on GPU and CPU, and reads a KV cache when decoding.

Legend: S sequence, B batch, A attention heads, G key-value heads, D head dimension; A and G are
this tensor-parallel rank's share.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.kv_cache import KVCache


class CoreAttention(nn.Module):
    """softmax(Q K^T / sqrt(D)) V with a causal mask and grouped queries.

    Built by megatron's `SelfAttention` from the layer spec, hence the signature of `__init__`.

    Attributes:
        cache: set while decoding; None in training.
        recompute: run the attention again in backward instead of keeping its results.
    """

    def __init__(
        self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, **_: Any
    ) -> None:
        super().__init__()
        assert attention_type == "self", attention_type
        self.layer_number = layer_number
        self.recompute = False
        self.cache: KVCache | None = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Attend.

        Args:
            query: `[S, B, A, D]`, rotary applied.
            key: `[S, B, G, D]`, rotary applied.
            value: `[S, B, G, D]`.
            attention_mask: `[B, 1, S, S]` bool, true where a query sees a key; None: all keys
                up to its own position. Not used while decoding.

        Returns:
            `[S, B, A * D]`.
        """
        if self.recompute and self.training and query.requires_grad:
            return checkpoint(
                _attention,
                query,
                key,
                value,
                attention_mask,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        if self.cache is None:
            return _attention(query, key, value, attention_mask)
        cached = self.cache.update(id(self), key, value)
        out = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            cached.key,
            cached.value,
            attn_mask=cached.mask,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return _merge_heads(out)


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    out = F.scaled_dot_product_attention(
        query.permute(1, 2, 0, 3),
        key.permute(1, 2, 0, 3),
        value.permute(1, 2, 0, 3),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return _merge_heads(out)


def _merge_heads(out: Tensor) -> Tensor:
    """`[B, A, S, D]` to `[S, B, A * D]`."""
    return out.permute(2, 0, 1, 3).flatten(2)
