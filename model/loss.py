"""Cross-entropy straight from hidden states, chunk by chunk: loss and both gradients.

No `[tokens, vocabulary]` tensor exists at any time: a chunk's logits are turned into its part of
the gradients and dropped before the next chunk begins. The vocabulary may be split over
tensor-parallel ranks; three small reductions per chunk make the softmax exact.

Legend: T tokens, H hidden, V vocabulary, V' this rank's share of it.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

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


def loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    shard: VocabularyShard,
    scale: Tensor | float,
    weight_gradient: Tensor,
    chunk_tokens: int,
) -> LossAndGradient:
    """Cross-entropy of `hidden @ weight.T` against labels, with both gradients.

    Args:
        hidden: `[T, H]`, the same on all ranks of the group.
        weight: `[V', H]`, this rank's rows of the unembedding.
        labels: `[T]` global token ids; `IGNORED` positions count for nothing.
        shard: which rows `weight` is.
        scale: factor on the gradients (head weight over the global count of valid targets).
        weight_gradient: `[V', H]`, added to in place; float32 keeps sums over heads exact.
        chunk_tokens: tokens whose logits exist at once.

    Returns:
        The loss sum and the hidden gradient, equal on all ranks of the group.
    """
    hidden_gradient = torch.empty_like(hidden)
    loss_sum = hidden.new_zeros((), dtype=_softmax_dtype(hidden))
    for start in range(0, hidden.shape[0], chunk_tokens):
        part = slice(start, start + chunk_tokens)
        losses, logit_gradient = _chunk(hidden[part], weight, labels[part], shard)
        loss_sum += losses.sum()
        logit_gradient = logit_gradient.mul_(scale).to(hidden.dtype)
        torch.mm(logit_gradient, weight, out=hidden_gradient[part])
        if weight_gradient.dtype == hidden.dtype:
            weight_gradient.addmm_(logit_gradient.t(), hidden[part])
        else:
            weight_gradient.add_(logit_gradient.t() @ hidden[part])
    shard.reduce(hidden_gradient)
    return LossAndGradient(loss_sum, hidden_gradient)


def loss_and_predictions(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, shard: VocabularyShard, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """Loss sum and greedy predictions, for validation.

    Returns:
        (scalar loss sum over valid tokens, `[T]` ids of the largest logit).
    """
    losses: list[Tensor] = []
    predictions: list[Tensor] = []
    for start in range(0, hidden.shape[0], chunk_tokens):
        part = slice(start, start + chunk_tokens)
        logits = _logits(hidden[part], weight)
        largest, best = logits.max(dim=-1)
        predictions.append(_global_argmax(largest, best, shard))
        chunk_losses, _ = _softmax_loss(logits, largest, labels[part], shard)
        losses.append(chunk_losses.sum())
    return torch.stack(losses).sum(), torch.cat(predictions)


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
    ) -> Tensor:
        weight_gradient = torch.zeros_like(weight, dtype=_softmax_dtype(weight))
        result = loss_and_gradients(
            hidden,
            weight,
            labels,
            shard=shard,
            scale=1.0,
            weight_gradient=weight_gradient,
            chunk_tokens=chunk_tokens,
        )
        ctx.save_for_backward(result.hidden_gradient, weight_gradient.to(weight.dtype))
        return result.loss_sum

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        (grad_output,) = grad_outputs
        return (
            hidden_gradient * grad_output.to(hidden_gradient.dtype),
            weight_gradient * grad_output.to(weight_gradient.dtype),
            None,
            None,
            None,
        )


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, shard: VocabularyShard, chunk_tokens: int
) -> Tensor:
    """Differentiable sum of token losses; arguments as in `loss_and_gradients`.

    Returns:
        Scalar; divide by the global count of valid targets for a mean.
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, shard, chunk_tokens)
    return loss


def _softmax_dtype(tensor: Tensor) -> torch.dtype:
    """At least float32: a bf16 softmax over 32k entries loses the small ones."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return (hidden @ weight.t()).to(_softmax_dtype(hidden))


def _chunk(
    hidden: Tensor, weight: Tensor, labels: Tensor, shard: VocabularyShard
) -> tuple[Tensor, Tensor]:
    """Token losses `[t]` and the gradient of their sum by the logits `[t, V']`."""
    logits = _logits(hidden, weight)
    largest = logits.max(dim=-1).values
    losses, probabilities = _softmax_loss(logits, largest, labels, shard)
    valid = labels != IGNORED
    owned, local = _owned(labels, shard)
    probabilities.scatter_add_(1, local.unsqueeze(1), -owned.to(probabilities.dtype).unsqueeze(1))
    return losses, probabilities.mul_(valid.unsqueeze(1))


def _softmax_loss(
    logits: Tensor, largest: Tensor, labels: Tensor, shard: VocabularyShard
) -> tuple[Tensor, Tensor]:
    """Token losses `[t]` (0 where ignored) and probabilities `[t, V']`, in the logits' memory."""
    largest = shard.reduce(largest.clone(), dist.ReduceOp.MAX)
    logits.sub_(largest.unsqueeze(1))
    owned, local = _owned(labels, shard)
    target = logits.gather(1, local.unsqueeze(1)).squeeze(1) * owned
    exponentials = logits.exp_()
    # One reduction carries both: the softmax's denominator and the target's logit.
    both = shard.reduce(torch.stack((exponentials.sum(dim=-1), target)))
    total, target = both[0], both[1]
    losses = (total.log() - target).where(labels != IGNORED, total.new_zeros(()))
    return losses, exponentials.div_(total.unsqueeze(1))


def _owned(labels: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """Which labels are rows of this shard, and their row there (0 where they are not)."""
    local = labels - shard.start
    owned = (local >= 0) & (local < shard.size)
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
