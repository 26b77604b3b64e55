"""Losses of all heads and their gradients: head by head, or jointly for comparison.

Sequential-head backward (Gloeckle et al. 2024, section 2, figure 2): each head runs forward and
backward on a detached copy of the trunk's output before the next head begins, so the activations
and logits of only one head exist at a time. The trunk's output, the final norm and the
unembedding are shared by all heads; they are used through detached leaves that collect the heads'
gradients, and a last scalar delivers each collected gradient once. Every parameter thus receives
exactly one gradient per micro-batch, which is what ZeRO's gradient hooks assume, and the shared
unembedding is reduced over the ranks once instead of n times.

Legend: B batch, S sequence, H hidden, n heads.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.heads import LMHeadWeights
from model.language_model import MultiTokenModel
from model.loss import linear_cross_entropy, loss_and_gradients, loss_and_predictions


class MicroBatchResult(NamedTuple):
    """One micro-batch's losses, and a surrogate loss whose backward completes its gradients.

    Attributes:
        loss_sums: `[n]` float32, sum of each head's token losses on this rank, unscaled.
        surrogate_loss: scalar with a graph; call backward on it once. Its value means nothing, its
            gradients are those of the scaled losses that no parameter has received yet.
    """

    loss_sums: Tensor
    surrogate_loss: Tensor


class LMHeadGradients(NamedTuple):
    """Where heads add up the gradients of the weights they share, over heads and micro-batches.

    Attributes:
        norm: `[H]`, at least float32.
        unembedding: `[V', H]`, at least float32.
    """

    norm: Tensor
    unembedding: Tensor

    @classmethod
    def zeros(cls, shared: LMHeadWeights) -> "LMHeadGradients":
        """Nothing yet."""
        dtype = torch.promote_types(shared.unembedding.dtype, torch.float32)
        return cls(*(torch.zeros_like(weight, dtype=dtype) for weight in shared))

    def pairs(self, shared: LMHeadWeights) -> list[tuple[Tensor, Tensor | None]]:
        """Each shared weight with its gradient in its own precision, for `deliver`."""
        return [(w, g.to(w.dtype)) for w, g in zip(shared, self, strict=True)]


class HeadsResult(NamedTuple):
    """What the heads of one part of the model give for one micro-batch.

    Attributes:
        loss_sums: `[heads here]` float32, sum of each head's token losses on this rank, unscaled.
        trunk_gradient: `[S, B, H]`, of the scaled losses with respect to z; None when z needs none.
    """

    loss_sums: Tensor
    trunk_gradient: Tensor | None


def sequential_backward(
    model: MultiTokenModel,
    trunk_output: Tensor,
    labels: Tensor,
    scales: Tensor,
    *,
    chunk_tokens: int,
    documents: Tensor | None = None,
) -> MicroBatchResult:
    """Forward and backward of every head in turn.

    The gradients of head layers are final when this returns; those of the trunk, the final norm
    and the unembedding arrive with `surrogate_loss.backward()`.

    Args:
        model: the model; under ZeRO its engine's module.
        trunk_output: z `[S, B, H]` with its graph.
        labels: `[n, B, S]`, -100 where ignored.
        scales: `[n]`, factor on each head's loss sum.
        chunk_tokens: tokens whose logits exist at once.
        documents: `[B, S]`, the ones with which the trunk ran.

    Returns:
        Loss sums, and the scalar that delivers the shared gradients.
    """
    shared = model.heads.lm_head()
    trained = shared.unembedding.requires_grad
    gradients = LMHeadGradients.zeros(shared) if trained else None
    result = heads_backward(
        model,
        trunk_output,
        labels,
        scales,
        shared=shared,
        gradients=gradients,
        chunk_tokens=chunk_tokens,
        documents=documents,
    )
    pairs = [(trunk_output, result.trunk_gradient)]
    if gradients is not None:
        pairs += gradients.pairs(shared)
    return MicroBatchResult(result.loss_sums, deliver(pairs))


def heads_backward(
    model: MultiTokenModel,
    trunk_output: Tensor,
    labels: Tensor,
    scales: Tensor,
    *,
    shared: LMHeadWeights,
    gradients: LMHeadGradients | None,
    chunk_tokens: int,
    documents: Tensor | None = None,
) -> HeadsResult:
    """Forward and backward, in turn, of the heads that this part of the model holds.

    Only head layers receive their gradients here. Those of the LM head are added to `gradients`,
    and that of z is returned, for the caller to `deliver` once.

    Args:
        model: the model or the part of it.
        trunk_output: z `[S, B, H]`.
        labels: `[n, B, S]` of all heads of the model, -100 where ignored.
        scales: `[n]` of all heads of the model, factor on each head's loss sum.
        shared: what `model.heads.lm_head()` gave.
        gradients: of the LM head, added to in place; None when it is frozen.
        chunk_tokens: tokens whose logits exist at once.
        documents: `[B, S]`, the ones with which the trunk ran.
    """
    lm_head = model.heads.lm_head
    context = model.context(trunk_output.shape[0], trunk_output.device, documents)
    leaf = trunk_output.detach().requires_grad_(trunk_output.requires_grad)
    norm = shared.norm.detach().requires_grad_(gradients is not None)
    unembedding = shared.unembedding.detach()
    sums = []
    for head in model.heads.numbers:
        normed = lm_head.normalize(model.heads.hidden(head, leaf, context), norm)
        hidden, targets = normed.detach().flatten(0, 1), _sequence_first(labels[head - 1])
        if not normed.requires_grad and gradients is None:  # nothing of it is trained
            loss, _ = loss_and_predictions(
                hidden, unembedding, targets, shard=model.shard, chunk_tokens=chunk_tokens
            )
            sums.append(loss)
            continue
        result = loss_and_gradients(
            hidden,
            unembedding,
            targets,
            shard=model.shard,
            scale=scales[head - 1],
            weight_gradient=gradients.unembedding if gradients else None,
            chunk_tokens=chunk_tokens,
        )
        if normed.requires_grad:
            normed.backward(result.hidden_gradient.view_as(normed))
        sums.append(result.loss_sum)
    if gradients is not None and norm.grad is not None:
        gradients.norm.add_(norm.grad)
    return HeadsResult(torch.stack(sums), leaf.grad)


def joint_loss(
    model: MultiTokenModel,
    trunk_output: Tensor,
    labels: Tensor,
    scales: Tensor,
    *,
    chunk_tokens: int,
    documents: Tensor | None = None,
) -> MicroBatchResult:
    """All heads forward in one graph, whose backward is still to come; for comparison.

    Arguments and result as in `sequential_backward`; every gradient arrives with
    `surrogate_loss`, which here is the weighted sum of the losses itself.
    """
    norm, unembedding = model.heads.lm_head()
    context = model.context(trunk_output.shape[0], trunk_output.device, documents)
    losses = []
    for index, head in enumerate(model.heads.numbers):
        hidden = model.heads.hidden(head, trunk_output, context)
        normed = model.heads.lm_head.normalize(hidden, norm)
        losses.append(
            linear_cross_entropy(
                normed.flatten(0, 1),
                unembedding,
                _sequence_first(labels[index]),
                shard=model.shard,
                chunk_tokens=chunk_tokens,
            )
        )
    sums = torch.stack(losses)
    return MicroBatchResult(sums.detach(), (sums * scales).sum())


def _sequence_first(labels: Tensor) -> Tensor:
    """`[B, S]` labels in the order of flattened `[S, B, H]` activations."""
    return labels.t().flatten()


class _Deliver(torch.autograd.Function):
    """A zero whose backward gives each tensor the gradient that was collected for it."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return tensors[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        return (None, *(gradient.mul_(scale) for gradient in ctx.gradients))


def deliver(pairs: list[tuple[Tensor, Tensor | None]]) -> Tensor:
    """The scalar whose backward gives every tensor of a pair its gradient."""
    wanted = [(tensor, grad) for tensor, grad in pairs if tensor.requires_grad]
    if not wanted:  # only the head layers are trained, and they have their gradients
        # A zero with a graph, which DeepSpeed expects of a loss; its leaf is not a parameter.
        return pairs[0][0].new_zeros((), dtype=torch.float32, requires_grad=True) * 1.0
    gradients = [torch.zeros_like(tensor) if grad is None else grad for tensor, grad in wanted]
    surrogate_loss: Tensor = _Deliver.apply(gradients, *(tensor for tensor, _ in wanted))
    return surrogate_loss
