"""Cross-entropy straight from hidden states, chunk by chunk: loss and both gradients.

No `[tokens, vocabulary]` tensor exists at any time: a chunk's logits are turned into its part of
the gradients and dropped before the next chunk begins. The vocabulary may be split over
tensor-parallel ranks; three small reductions per chunk make the softmax exact.

Legend: T tokens, H hidden, V vocabulary, V' this rank's share of it.
"""

import functools
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.operations.compiled import compiled

IGNORED = -100


class VocabularyShard(NamedTuple):
    """The rows of the unembedding that this rank holds.

    Attributes:
        start: id of the first row.
        size: V', number of rows.
        group: tensor-parallel group, or None when this rank holds the whole vocabulary.
    """

    start: int
    size: int
    group: dist.ProcessGroup | None

    @classmethod
    def of_rank(cls, local_size: int, group: dist.ProcessGroup | None) -> "VocabularyShard":
        """The shard of this rank, where every rank of `group` holds `local_size` rows."""
        if group is None or dist.get_world_size(group) == 1:
            return cls(0, local_size, None)
        return cls(dist.get_rank(group) * local_size, local_size, group)

    def reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """All-reduce in place over the group; nothing to do for a whole vocabulary."""
        if self.group is not None:
            dist.all_reduce(tensor, op=op, group=self.group)
        return tensor


class LossAndGradient(NamedTuple):
    """What one head's loss leaves behind.

    Attributes:
        loss_sum: float32 (float64 for float64 input) scalar, sum over valid tokens, unscaled.
        hidden_gradient: `[T, H]`, of `scale * loss_sum`.
    """

    loss_sum: Tensor
    hidden_gradient: Tensor


@torch.no_grad()
def loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    shard: VocabularyShard,
    scale: Tensor | float,
    weight_gradient: Tensor | None,
    chunk_tokens: int,
    token_losses: Tensor | None = None,
    is_compiled: bool = False,
) -> LossAndGradient:
    """Cross-entropy of `hidden @ weight.T` against labels, with both gradients.

    Args:
        hidden: `[T, H]`, the same on all ranks of the group.
        weight: `[V', H]`, this rank's rows of the unembedding.
        labels: `[T]` global token ids; `IGNORED` positions count for nothing.
        shard: which rows `weight` is.
        scale: factor on the gradients (head weight over the global count of valid targets).
        weight_gradient: `[V', H]`, added to in place; float32 keeps sums over heads exact. None:
            the unembedding is frozen.
        chunk_tokens: tokens whose logits exist at once.
        token_losses: `[T]`, filled with the loss of each token, 0 where it is ignored; or None.
        is_compiled: the softmax by kernels that torch.compile makes.

    Returns:
        The loss sum and the hidden gradient, equal on all ranks of the group.
    """
    chunk = _compiled_chunk if is_compiled else _chunk
    hidden_gradient = torch.empty_like(hidden)
    loss_sum = hidden.new_zeros((), dtype=_softmax_dtype(hidden))
    for start in range(0, hidden.shape[0], chunk_tokens):
        part = slice(start, start + chunk_tokens)
        losses, logit_gradient = chunk(hidden[part], weight, labels[part], shard, scale)
        loss_sum += losses.sum()
        if token_losses is not None:
            token_losses[part] = losses
        torch.mm(logit_gradient, weight, out=hidden_gradient[part])
        if weight_gradient is None:
            continue
        _add_product(weight_gradient, logit_gradient.t(), hidden[part])
    shard.reduce(hidden_gradient)
    return LossAndGradient(loss_sum, hidden_gradient)


@torch.no_grad()
def loss_and_predictions(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    shard: VocabularyShard,
    chunk_tokens: int,
    token_losses: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss sum and greedy predictions, for validation.

    Arguments are those of `loss_and_gradients`.

    Returns:
        (scalar loss sum over valid tokens, `[T]` ids of the largest logit).
    """
    losses: list[Tensor] = []
    predictions: list[Tensor] = []
    for start in range(0, hidden.shape[0], chunk_tokens):
        part = slice(start, start + chunk_tokens)
        logits = hidden[part] @ weight.t()
        largest, best = logits.max(dim=-1)
        predictions.append(_global_argmax(largest, best, shard))
        found = _softmax(logits, largest, labels[part], shard).losses
        if token_losses is not None:
            token_losses[part] = found
        losses.append(found.sum())
    return torch.stack(losses).sum(), torch.cat(predictions)


def add_sequence_losses(sums: Tensor, token_losses: Tensor) -> None:
    """Add each sequence's token losses to its sum.

    Args:
        sums: `[B]`, changed in place.
        token_losses: `[S * B]`, sequence first.
    """
    # A sequence's tokens side by side: the same sum whatever sequences are beside it.
    sums.add_(token_losses.view(-1, len(sums)).t().contiguous().sum(1))


class _LinearCrossEntropy(torch.autograd.Function):
    """`loss_and_gradients` as a differentiable function of hidden states and unembedding."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        shard: VocabularyShard,
        chunk_tokens: int,
        is_compiled: bool,
    ) -> Tensor:
        weight_gradient = None
        if ctx.needs_input_grad[1]:
            weight_gradient = torch.zeros_like(weight, dtype=_softmax_dtype(weight))
        result = loss_and_gradients(
            hidden,
            weight,
            labels,
            shard=shard,
            scale=1.0,
            weight_gradient=weight_gradient,
            chunk_tokens=chunk_tokens,
            is_compiled=is_compiled,
        )
        if weight_gradient is not None:
            weight_gradient = weight_gradient.to(weight.dtype)
        ctx.save_for_backward(result.hidden_gradient, weight_gradient)
        return result.loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        of_hidden, of_weight = (
            None if gradient is None else gradient * grad_output.to(gradient.dtype)
            for gradient in ctx.saved_tensors
        )
        return of_hidden, of_weight, None, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    shard: VocabularyShard,
    chunk_tokens: int,
    is_compiled: bool = False,
) -> Tensor:
    """Differentiable sum of token losses; arguments as in `loss_and_gradients`.

    Returns:
        Scalar; divide by the global count of valid targets for a mean.
    """
    loss: Tensor = _LinearCrossEntropy.apply(
        hidden, weight, labels, shard, chunk_tokens, is_compiled
    )
    return loss


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right` in place, by the product itself wherever it can.

    As a product and a sum apart, a float32 total of bf16 products is written and read once more,
    and each product is rounded to bf16 before.
    """
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda and product_adds_in_float32(total.device):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.add_(left @ right)


@functools.cache
def product_adds_in_float32(device: torch.device) -> bool:
    """Whether this torch adds a product of bf16 matrices to a float32 one in a single kernel.

    Tried rather than asked for: older versions lack the operation, refuse a float32 sum, or have it
    on other devices only. The device is waited for, so the first call belongs before training.
    """
    total = torch.ones(16, 16, device=device)
    left = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    try:
        torch.addmm(total, left, left, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):  # NotImplementedError is one of the former
        return False
    return bool((total == 17.0).all())


def _softmax_dtype(tensor: Tensor) -> torch.dtype:
    """At least float32: a bf16 softmax over 32k entries loses the small ones."""
    return torch.promote_types(tensor.dtype, torch.float32)


class _Softmax(NamedTuple):
    """A chunk's softmax, before its division.

    Attributes:
        losses: `[t]`, 0 where the label is ignored.
        exponentials: `[t, V']` of this shard, in the logits' memory where their dtype allows.
        total: `[t]` sum of the exponentials over all shards.
    """

    losses: Tensor
    exponentials: Tensor
    total: Tensor


def _chunk(
    hidden: Tensor, weight: Tensor, labels: Tensor, shard: VocabularyShard, scale: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Token losses `[t]` and `scale` times the gradient of their sum by the logits `[t, V']`."""
    logits = hidden @ weight.t()
    softmax = _softmax(logits, logits.amax(dim=-1), labels, shard)
    del logits
    owned, local = _owned(labels, shard.start, shard.size)
    # The target's share is taken off before rounding to bf16, where p - 1 would lose its digits.
    gradient = softmax.exponentials
    gradient.scatter_add_(1, local.unsqueeze(1), -(softmax.total * owned).unsqueeze(1))
    # Division, mask, scale and rounding in one pass.
    factor = (scale / softmax.total * (labels != IGNORED)).unsqueeze(1)
    rounded = (
        gradient
        if gradient.dtype == hidden.dtype
        else torch.empty_like(gradient, dtype=hidden.dtype)
    )
    return softmax.losses, torch.mul(gradient, factor, out=rounded)


def _softmax(logits: Tensor, largest: Tensor, labels: Tensor, shard: VocabularyShard) -> _Softmax:
    """Softmax and token losses, given each row's largest logit of this shard; spends `logits`."""
    dtype = _softmax_dtype(logits)
    largest = shard.reduce(largest.to(dtype, copy=True), dist.ReduceOp.MAX).unsqueeze(1)
    shifted = logits.sub_(largest) if logits.dtype == dtype else logits - largest
    owned, local = _owned(labels, shard.start, shard.size)
    target = shifted.gather(1, local.unsqueeze(1)).squeeze(1) * owned
    exponentials = shifted.exp_()
    # One reduction carries both: the softmax's denominator and the target's logit.
    total, target = shard.reduce(torch.stack((exponentials.sum(dim=-1), target))).unbind()
    losses = (total.log() - target).where(labels != IGNORED, total.new_zeros(()))
    return _Softmax(losses, exponentials, total)


def _compiled_chunk(
    hidden: Tensor, weight: Tensor, labels: Tensor, shard: VocabularyShard, scale: Tensor | float
) -> tuple[Tensor, Tensor]:
    """`_chunk` by compiled kernels: one that sums, one that turns logits into their gradient."""
    logits = hidden @ weight.t()
    # A softmax takes two passes. Over a part of a row the second one finds it in the cache.
    parts = logits.unflatten(1, (-1, _part_size(logits.shape[1])))
    if shard.group is None:
        losses, *rows = compiled(plain_rows)(parts, labels, shard.start, scale)
    else:
        owned, local = _owned(labels, shard.start, shard.size)
        mine, total, target = compiled(plain_softmax_sums)(parts, local)
        largest = shard.reduce(mine.clone(), dist.ReduceOp.MAX)
        total, target = shard.reduce(
            torch.stack((total * (mine - largest).exp(), (target - largest) * owned))
        ).unbind()
        losses, factor, taken = _losses_and_factors(total, target, labels, scale)
        rows = [largest, factor, taken * owned, local]
    compiled(plain_logit_gradient_)(logits, *rows)
    return losses, logits


@functools.cache
def _part_size(size: int) -> int:
    """The largest divisor up to 8192 that keeps parts of a row at multiples of 16 bytes, or all."""
    return max((n for n in range(1024, 8193, 8) if size % n == 0), default=size)


def _losses_and_factors(
    total: Tensor, target: Tensor, labels: Tensor, scale: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """Token losses, and `scale` over the total and as it is, 0 where a label is ignored."""
    valid = labels != IGNORED
    losses = (total.log() - target).where(valid, total.new_zeros(()))
    taken = scale * valid.to(total.dtype)
    return losses, taken / total, taken


def plain_rows(
    parts: Tensor, labels: Tensor, start: int, scale: Tensor | float
) -> tuple[Tensor, ...]:
    """Token losses, and what `plain_logit_gradient_` takes, of a whole vocabulary; to be compiled.

    Arguments are those of `_chunk` and `plain_softmax_sums`; `start` is the shard's.
    """
    owned, local = _owned(labels, start, parts.shape[1] * parts.shape[2])
    largest, total, target = plain_softmax_sums(parts, local)
    losses, factor, taken = _losses_and_factors(total, target - largest, labels, scale)
    return losses, largest, factor, taken * owned, local


def plain_softmax_sums(parts: Tensor, local: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What this shard adds to a softmax, to be compiled.

    Args:
        parts: `[t, parts, V' / parts]` logits.
        local: `[t]` the row of each label.

    Returns:
        `[t]` each: the largest logit, the sum of the exponentials of logits less that one, and the
        label's logit; at least float32.
    """
    wide = parts.to(_softmax_dtype(parts))
    most = wide.amax(dim=-1)
    sums = (wide - most.unsqueeze(-1)).exp().sum(dim=-1)
    largest = most.amax(dim=-1)
    total = (sums * (most - largest.unsqueeze(-1)).exp()).sum(dim=-1)
    return largest, total, wide.flatten(1).gather(1, local.unsqueeze(1)).squeeze(1)


def plain_logit_gradient_(
    logits: Tensor, largest: Tensor, factor: Tensor, taken: Tensor, local: Tensor
) -> None:
    """Turn logits into the gradient of the loss by them, in place; to be compiled.

    Args:
        logits: `[t, V']`.
        largest: `[t]` logit over all shards.
        factor: `[t]`, on the exponentials.
        taken: `[t]`, off the label's own; 0 where another shard has it.
        local: `[t]` the row of each label.
    """
    wide = logits.to(_softmax_dtype(logits))
    gradient = (wide - largest.unsqueeze(1)).exp() * factor.unsqueeze(1)
    is_label = torch.arange(logits.shape[1], device=logits.device) == local.unsqueeze(1)
    logits.copy_(torch.where(is_label, gradient - taken.unsqueeze(1), gradient))


def _owned(labels: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """Which labels are rows of a shard, and their row there (0 where they are not)."""
    local = labels - start
    owned = (local >= 0) & (local < size)
    return owned, local.where(owned, local.new_zeros(()))


def _global_argmax(largest: Tensor, best: Tensor, shard: VocabularyShard) -> Tensor:
    """Ids of the largest logits over all shards; the lowest id wins a tie, as in one process."""
    ids = best + shard.start
    if shard.group is None:
        return ids
    overall = shard.reduce(largest.clone(), dist.ReduceOp.MAX)
    unreachable = torch.iinfo(ids.dtype).max
    candidates = ids.where(largest == overall, torch.full_like(ids, unreachable))
    return shard.reduce(candidates, dist.ReduceOp.MIN)
