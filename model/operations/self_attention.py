"""Self-attention: megatron's modules, with one step from their product to rotated heads.

Megatron splits the product, rotates queries and keys in a dozen operations each, with new cosines
in every layer, and keeps the whole product for backward beside the rotated parts, because values
are a view of it. Here one function writes queries, keys and values, forward and back.

Legend: S sequence, B batch, H hidden, A attention heads, G key-value heads, R = A / G, D head
dimension; A and G are this tensor-parallel rank's share.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttention as MegatronSelfAttention
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.operations.compiled import compiled
from model.operations.documents import AttentionMask
from model.operations.rotary import Rotation


class SelfAttention(MegatronSelfAttention):
    """Product, rotation, core attention, projection; weights and their names are megatron's."""

    _compiled = False

    def compile_kernel(self) -> None:
        """Split and rotate with a kernel that torch.compile makes."""
        self._compiled = True

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
        heads = split_and_rotate(
            mixed, rotary_pos_emb, self.num_query_groups_per_partition, self._compiled
        )
        projected: tuple[Tensor, Tensor | None] = self.linear_proj(
            self.core_attention(*heads, attention_mask)
        )
        return projected


def split_and_rotate(
    mixed: Tensor, rotation: Rotation, groups: int, is_compiled: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values from the one product that holds them; the first two rotated.

    Args:
        mixed: `[S, B, G * (R + 2) * D]`: for each key-value head its R queries, its key, its value.
        rotation: of the positions, in the dtype of `mixed`.
        groups: G.
        is_compiled: by a kernel that torch.compile makes, with one rounding at the end.

    Returns:
        `[S, B, A, D]`, and twice `[S, B, G, D]`; none of them is a view of `mixed`.
    """
    assert mixed.dtype == rotation.cos.dtype, (mixed.dtype, rotation.cos.dtype)
    heads: tuple[Tensor, Tensor, Tensor] = _SplitAndRotate.apply(
        mixed, *rotation, groups, is_compiled
    )
    return heads


def plain_split_and_rotate(
    mixed: Tensor, cos: Tensor, sin: Tensor, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`split_and_rotate` as it is defined, to be compiled; arguments and results as there."""
    parts = mixed.unflatten(-1, (groups, -1, 2 * cos.shape[-1]))  # [S, B, G, R + 2, D]
    query, key = (
        _turned(*_halves(part), cos, sin).flatten(-2)
        for part in (parts[..., :-2, :], parts[..., -2:-1, :])
    )
    value = parts[..., -1, :].clone(memory_format=torch.contiguous_format)
    return query.flatten(2, 3), key.squeeze(3), value


def plain_turn_back_and_join(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """The gradient of `split_and_rotate` from those of its results, to be compiled.

    Args:
        query: `[S, B, A, D]`.
        key: `[S, B, G, D]`.
        value: `[S, B, G, D]`.
        cos: `[S, 1 or B, 1, D / 2]`.
        sin: likewise.

    Returns:
        `[S, B, G * (R + 2) * D]`.
    """
    per_group = query.shape[2] // key.shape[2]
    # Padded and added rather than concatenated: one kernel, which writes nothing in between.
    first, second = (
        F.pad(of_query, (0, 0, 0, 0, 0, 2))
        + F.pad(of_key, (0, 0, 0, 0, per_group, 1))
        + F.pad(of_value, (0, 0, 0, 0, per_group + 1, 0))
        for of_query, of_key, of_value in zip(
            _halves(query.unflatten(2, (-1, per_group))),
            _halves(key.unsqueeze(3)),
            _halves(value.unsqueeze(3)),
            strict=True,
        )
    )
    is_value = torch.arange(per_group + 2, device=key.device) == per_group + 1
    as_they_are = torch.where(_is_first(key), first, second)
    turned = _turned(first, second, cos, -sin)
    return torch.where(is_value[:, None, None], as_they_are, turned).flatten(2)


def _turned(first: Tensor, second: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The pairs (i, i + D/2) of `[S, B, G, R, D]`, turned: `[S, B, G, R, 2, D/2]`.

    Args:
        first: what `_halves` gave.
        second: likewise.
        cos: `[S, 1 or B, 1, D / 2]`.
        sin: likewise.
    """
    cos, sin = cos[:, :, :, None, None, :], sin[:, :, :, None, None, :]
    return torch.where(_is_first(first), first * cos - second * sin, second * cos + first * sin)


def _halves(source: Tensor) -> tuple[Tensor, Tensor]:
    """Of each pair the first, and the second, at both places: `[S, B, G, R, 2, D/2]` each.

    So numbers are read in runs, as they lie. Flipped halves would be read one by one: the compiler
    sees no runs in them.
    """
    halves = source.unflatten(-1, (2, -1))
    first, second = halves.split(1, dim=-2)
    return first.expand_as(halves), second.expand_as(halves)


def _is_first(like: Tensor) -> Tensor:
    """`[2, 1]`, on the device of a tensor."""
    return torch.arange(2, device=like.device).unsqueeze(1) == 0


class _SplitAndRotate(torch.autograd.Function):
    """Linear, so that backward is the same with the opposite angles and keeps no activation."""

    @staticmethod
    def forward(
        ctx: Any, mixed: Tensor, cos: Tensor, sin: Tensor, groups: int, is_compiled: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.is_compiled = is_compiled
        if is_compiled:
            heads: tuple[Tensor, Tensor, Tensor] = compiled(plain_split_and_rotate)(
                mixed, cos, sin, groups
            )
            return heads
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
        if ctx.is_compiled:
            joined = compiled(plain_turn_back_and_join)(query, key, value, cos, sin)
            return joined, None, None, None, None
        length, batch, groups, width = key.shape
        per_group = query.shape[2] // groups
        shape = (length, batch, groups, per_group + 2, width)
        mixed = torch.empty(shape, dtype=key.dtype, device=key.device)
        _rotate(query.unflatten(2, (groups, -1)), cos, sin, out=mixed[..., :-2, :], sign=-1)
        _rotate(key.unsqueeze(3), cos, sin, out=mixed[..., -2:-1, :], sign=-1)
        mixed[..., -1, :].copy_(value)
        return mixed.flatten(2), None, None, None, None


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
