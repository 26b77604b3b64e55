"""Core attention on torch's scaled_dot_product_attention, instead of megatron's.

Megatron's `DotProductAttention` needs CUDA and materializes the scores. This one runs torch's flash
kernels on GPU and CPU, and torch's flex attention for sequences of several documents on a GPU.

Legend: S sequence, B batch, A attention heads, G key-value heads, D head dimension; A and G are
this tensor-parallel rank's share.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from model.operations.attention_backend import KERNELS_WITH_BIAS, AttentionBackend
from model.operations.documents import AttentionMask


class CoreAttention(nn.Module):
    """softmax(Q K^T / sqrt(D)) V with a causal mask and grouped queries.

    Built by megatron's `SelfAttention` from the layer spec, hence the signature of `__init__`.

    Attributes:
        backend: torch's kernel for causal attention; None = as torch chooses.
        recompute: run the attention again in backward instead of keeping its results.
    """

    def __init__(
        self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, **_: Any
    ) -> None:
        super().__init__()
        assert attention_type == "self", attention_type
        self.layer_number = layer_number
        self.recompute = False
        self.backend: AttentionBackend | None = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: AttentionMask | None = None,
        **_: Any,
    ) -> Tensor:
        """Attend.

        Args:
            query: `[S, B, A, D]`, rotary applied.
            key: `[S, B, G, D]`, rotary applied.
            value: `[S, B, G, D]`.
            attention_mask: which keys a query sees; None: all up to its own position.

        Returns:
            `[S, B, A * D]`.
        """
        if self.recompute and self.training and query.requires_grad:
            return checkpoint(
                attend,
                query,
                key,
                value,
                attention_mask,
                self.backend,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        return attend(query, key, value, attention_mask, self.backend)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask | None,
    backend: AttentionBackend | None = None,
) -> Tensor:
    """Attention; arguments and result as in `CoreAttention.forward`.

    The backend was chosen for causal attention. One kernel takes masks in blocks; on a GPU one
    takes a bias, which has no groups of queries.
    """
    if isinstance(mask, BlockMask):
        return attend_blocks(query, key, value, mask, compiled=query.is_cuda)
    repeats = query.is_cuda if mask is not None else backend is not None and backend.repeats
    per_group = query.shape[2] // key.shape[2]
    if repeats and per_group > 1:
        key, value = (part.repeat_interleave(per_group, dim=2) for part in (key, value))
    if mask is not None:
        kernels = KERNELS_WITH_BIAS if query.is_cuda else []
    else:
        kernels = [] if backend is None else backend.kernels(query.shape[0])
    if not kernels:
        return _attend_dense(query, key, value, mask)
    with sdpa_kernel(kernels, set_priority=True):
        return _attend_dense(query, key, value, mask)


def _attend_dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    out = F.scaled_dot_product_attention(
        query.permute(1, 2, 0, 3),
        key.permute(1, 2, 0, 3),
        value.permute(1, 2, 0, 3),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return _merge_heads(out)


def attend_blocks(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *, compiled: bool
) -> Tensor:
    """The same with a mask in blocks.

    Compiled, one kernel visits the listed blocks alone; the first call makes the kernel, which
    takes seconds. Uncompiled it asks the mask about every pair of positions.
    """
    function = _compiled_flex_attention() if compiled else _flex_attention()
    out = function(
        query.permute(1, 2, 0, 3),
        key.permute(1, 2, 0, 3),
        value.permute(1, 2, 0, 3),
        block_mask=mask,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return _merge_heads(out)


def _flex_attention() -> Callable[..., Tensor]:
    return flex_attention


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    return torch.compile(_flex_attention())


def _merge_heads(out: Tensor) -> Tensor:
    """`[B, A, S, D]` to `[S, B, A * D]`."""
    return out.permute(2, 0, 1, 3).flatten(2)
