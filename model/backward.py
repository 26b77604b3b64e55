"""Losses of all heads and their gradients: head by head, or jointly as the reference.

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

from model.language_model import MultiTokenModel
from model.loss import linear_cross_entropy, loss_and_gradients, loss_and_predictions


class MicroBatchResult(NamedTuple):
    """One micro-batch's losses, and the scalar whose backward completes its gradients.

    Attributes:
        loss_sums: `[n]` float32, sum of each head's token losses on this rank, unscaled.
        remainder: scalar with a graph; call backward on it once.
    """

    loss_sums: Tensor
    remainder: Tensor


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
    and the unembedding arrive with `remainder.backward()`.

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
    readout = model.heads.readout
    shared = readout()
    context = model.context(trunk_output.shape[0], trunk_output.device, documents)
    leaf = trunk_output.detach().requires_grad_(trunk_output.requires_grad)
    norm = shared.norm.detach().requires_grad_(shared.norm.requires_grad)
    unembedding = shared.unembedding.detach()
    unembedding_gradient = None
    if shared.unembedding.requires_grad:
        dtype = torch.promote_types(unembedding.dtype, torch.float32)
        unembedding_gradient = torch.zeros_like(unembedding, dtype=dtype)
    sums = []
    for index, head in enumerate(model.heads.numbers):
        normed = readout.normalize(model.heads.hidden(head, leaf, context), norm)
        hidden, targets = normed.detach().flatten(0, 1), _sequence_first(labels[index])
        if not normed.requires_grad and unembedding_gradient is None:  # nothing of it is trained
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
            scale=scales[index],
            weight_gradient=unembedding_gradient,
            chunk_tokens=chunk_tokens,
        )
        if normed.requires_grad:
            normed.backward(result.hidden_gradient.view_as(normed))
        sums.append(result.loss_sum)
    remainder = _deliver(
        [
            (trunk_output, leaf.grad),
            (shared.norm, norm.grad),
            (
                shared.unembedding,
                None
                if unembedding_gradient is None
                else unembedding_gradient.to(unembedding.dtype),
            ),
        ]
    )
    return MicroBatchResult(torch.stack(sums), remainder)


def joint_backward(
    model: MultiTokenModel,
    trunk_output: Tensor,
    labels: Tensor,
    scales: Tensor,
    *,
    chunk_tokens: int,
    documents: Tensor | None = None,
) -> MicroBatchResult:
    """All heads forward in one graph, whose one backward is still to come; the reference.

    Arguments and result as in `sequential_backward`; every gradient arrives with `remainder`.
    """
    norm, unembedding = model.heads.readout()
    context = model.context(trunk_output.shape[0], trunk_output.device, documents)
    losses = []
    for index, head in enumerate(model.heads.numbers):
        hidden = model.heads.hidden(head, trunk_output, context)
        normed = model.heads.readout.normalize(hidden, norm)
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
    """A zero whose backward hands each tensor the gradient that was collected for it."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return tensors[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        return (None, *(gradient.mul_(scale) for gradient in ctx.gradients))


def _deliver(pairs: list[tuple[Tensor, Tensor | None]]) -> Tensor:
    """The scalar whose backward gives every tensor of a pair its gradient."""
    wanted = [(tensor, grad) for tensor, grad in pairs if tensor.requires_grad]
    if not wanted:  # only the head layers are trained, and they have their gradients
        # A zero with a graph, as DeepSpeed asks of a loss; its leaf is nobody's parameter.
        return pairs[0][0].new_zeros((), dtype=torch.float32, requires_grad=True) * 1.0
    gradients = [torch.zeros_like(tensor) if grad is None else grad for tensor, grad in wanted]
    remainder: Tensor = _Deliver.apply(gradients, *(tensor for tensor, _ in wanted))
    return remainder
