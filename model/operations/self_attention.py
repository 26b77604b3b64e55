"""Self-attention: megatron's modules, with one step from their product to rotated heads.

Megatron splits the product, rotates queries and keys in a dozen operations each, with new cosines
in every layer, and keeps the whole product for backward beside the rotated parts, because values
are a view of it. Here one function writes queries, keys and values, forward and back.

Legend: S sequence, B batch, H hidden, A attention heads, G key-value heads, R = A / G, D head
dimension; A and G are this tensor-parallel rank's share.
"""

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention as MegatronSelfAttention
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.operations.documents import AttentionMask
from model.operations.rotary import Rotation


class SelfAttention(MegatronSelfAttention):
    """Product, rotation, core attention, projection; weights and their names are megatron's."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: AttentionMask | None,
        *,
        rotary_pos_emb: Rotation,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; called by megatron's layer, hence the names.

        Args:
            hidden_states: `[S, B, H]`, after the norm.
            attention_mask: which keys a query sees; None: all up to its own position.
            rotary_pos_emb: of the positions.

        Returns:
            `[S, B, H]`, and a bias that is None.
        """
        mixed, _bias = self.linear_qkv(hidden_states)
        heads = split_and_rotate(mixed, rotary_pos_emb, self.num_query_groups_per_partition)
        projected: tuple[Tensor, Tensor | None] = self.linear_proj(
            self.core_attention(*heads, attention_mask)
        )
        return projected


def split_and_rotate(
    mixed: Tensor, rotation: Rotation, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values from the one product that holds them; the first two rotated.

    Args:
        mixed: `[S, B, G * (R + 2) * D]`: for each key-value head its R queries, its key, its value.
        rotation: of the positions, in the dtype of `mixed`.
        groups: G.

    Returns:
        `[S, B, A, D]`, and twice `[S, B, G, D]`; none of them is a view of `mixed`.
    """
    assert mixed.dtype == rotation.cos.dtype, (mixed.dtype, rotation.cos.dtype)
    heads: tuple[Tensor, Tensor, Tensor] = _SplitAndRotate.apply(mixed, *rotation, groups)
    return heads


class _SplitAndRotate(torch.autograd.Function):
    """Linear, so that backward is the same with the opposite angles and keeps no activation."""

    @staticmethod
    def forward(
        ctx: Any, mixed: Tensor, cos: Tensor, sin: Tensor, groups: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        parts = mixed.unflatten(-1, (groups, -1, 2 * cos.shape[-1]))  # [S, B, G, R + 2, D]
        queries, keys = parts[..., :-2, :], parts[..., -2:-1, :]
        query = torch.empty(queries.shape, dtype=mixed.dtype, device=mixed.device)
        key = torch.empty(keys.shape, dtype=mixed.dtype, device=mixed.device)
        _rotate(queries, cos, sin, out=query)
        _rotate(keys, cos, sin, out=key)
        value = parts[..., -1, :].clone(memory_format=torch.contiguous_format)
        return query.flatten(2, 3), key.squeeze(3), value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        query, key, value = grad_outputs
        length, batch, groups, width = key.shape
        per_group = query.shape[2] // groups
        shape = (length, batch, groups, per_group + 2, width)
        mixed = torch.empty(shape, dtype=key.dtype, device=key.device)
        _rotate(query.unflatten(2, (groups, -1)), cos, sin, out=mixed[..., :-2, :], sign=-1)
        _rotate(key.unsqueeze(3), cos, sin, out=mixed[..., -2:-1, :], sign=-1)
        mixed[..., -1, :].copy_(value)
        return mixed.flatten(2), None, None, None


def _rotate(source: Tensor, cos: Tensor, sin: Tensor, *, out: Tensor, sign: int = 1) -> None:
    """Turn the pairs (i, i + D/2) of `[S, B, G, R, D]`; three passes, and no intermediate tensor.

    Args:
        source: what to turn.
        cos: `[S, 1 or B, 1, D / 2]`.
        sin: likewise.
        out: where the result goes, of the same shape.
        sign: -1 turns back.
    """
    halves, turned = source.unflatten(-1, (2, -1)), out.unflatten(-1, (2, -1))
    cos, sin = cos[:, :, :, None, None, :], sin.unsqueeze(3)
    torch.mul(halves, cos, out=turned)
    turned[..., 0, :].addcmul_(halves[..., 1, :], sin, value=-sign)
    turned[..., 1, :].addcmul_(halves[..., 0, :], sin, value=sign)
