"""Losses of all heads and their gradients: head by head, or jointly for comparison.

Sequential-head backward (Gloeckle et al. 2024, section 2, figure 2): each head runs forward and
backward on a detached copy of the trunk's output before the next head begins, so the activations
and logits of only one head exist at a time. The trunk's output, the final norm and the
unembedding are shared by all heads; they are used through detached leaves that collect the heads'
gradients, and a last scalar delivers each collected gradient once. Every parameter thus receives
exactly one gradient per micro-batch, which is what ZeRO's gradient hooks assume, and the shared
unembedding is reduced over the ranks once instead of n times.

In a chain each head reads what the head before it gave. The chain runs forward once and keeps
nothing but what each head reads; then the heads' turns come in reverse (appendix B, figure S11):
the head farthest from the trunk first, each running forward again, and taking the gradient that
came out of the turn before together with that of its own loss.

Legend: B batch, S sequence, H hidden, n heads.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.language_model import MultiTokenModel
from model.layers import LayerContext
from model.lm_head import LMHeadWeights
from model.loss import (
    add_sequence_losses,
    linear_cross_entropy,
    loss_and_gradients,
    loss_and_predictions,
)


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
        trunk_gradient: `[S, B, H]`, of the scaled losses with respect to z (in a stage that goes on
            with a chain, to what the first head here reads); None when z needs none.
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
    sequence_losses: Tensor | None = None,
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
        sequence_losses: `[B]` float64, gets head 1's loss sum of each sequence added; or None.

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
        sequence_losses=sequence_losses,
    )
    pairs = [(trunk_output, result.trunk_gradient)]
    if gradients is not None:
        pairs += gradients.pairs(shared)
    return MicroBatchResult(result.loss_sums, deliver(pairs))


class ChainInputs(NamedTuple):
    """What a chain's forward leaves for its backward.

    Attributes:
        inputs: `[S, B, H]` what each head here reads, in the order of computing.
        output: `[S, B, H]` of the last head here, before the norm.
    """

    inputs: list[Tensor]
    output: Tensor


@torch.no_grad()
def chain_forward(
    model: MultiTokenModel, trunk_output: Tensor, documents: Tensor | None = None
) -> ChainInputs:
    """Run the heads that this part of the model holds of a chain, all of them.

    Args:
        model: the model or the part of it.
        trunk_output: `[S, B, H]` what the first head here reads.
        documents: `[B, S]`, the ones with which the trunk ran.
    """
    context = model.heads_context(trunk_output, documents)
    inputs = _chain_inputs(model, trunk_output, context)
    return ChainInputs(inputs, model.heads.hidden(model.heads.order[-1], inputs[-1], context))


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
    chain: ChainInputs | None = None,
    output_gradient: Tensor | None = None,
    sequence_losses: Tensor | None = None,
) -> HeadsResult:
    """Forward and backward, in turn, of the heads that this part of the model holds.

    Only head layers, and unembeddings of one head, receive their gradients here. Those of the LM
    head are added to `gradients`, and that of z is returned, for the caller to `deliver` once.

    Args:
        model: the model or the part of it.
        trunk_output: z `[S, B, H]`, or what the first head here reads.
        labels: `[n, B, S]` of all heads of the model, -100 where ignored.
        scales: `[n]` of all heads of the model, factor on each head's loss sum.
        shared: what `model.heads.lm_head()` gave.
        gradients: of the LM head, added to in place; None when it is frozen.
        chunk_tokens: tokens whose logits exist at once.
        documents: `[B, S]`, the ones with which the trunk ran.
        chain: of a chain whose forward has run, what it left.
        output_gradient: `[S, B, H]` of the losses of a chain's further heads, with respect to what
            the last head here gave; None when there are none.
        sequence_losses: `[B]` float64, gets head 1's loss sum of each sequence added where head 1
            is here; or None.
    """
    context = model.heads_context(trunk_output, documents)
    norm = shared.norm.detach().requires_grad_(gradients is not None)
    turns = _Turns(
        model, labels, scales, norm, shared.unembedding.detach(), gradients, sequence_losses
    )
    if model.config.chain:
        inputs = _chain_inputs(model, trunk_output, context) if chain is None else chain.inputs
        wanted = output_gradient
        for place in reversed(range(len(inputs))):
            head, leaf = model.heads.order[place], inputs[place].detach()
            leaf.requires_grad_(_asks_gradient(model, trunk_output, place))
            turns.take(head, model.heads.hidden(head, leaf, context), wanted, chunk_tokens)
            wanted = leaf.grad
    else:
        leaf = trunk_output.detach().requires_grad_(trunk_output.requires_grad)
        for head in model.heads.order:
            turns.take(head, model.heads.hidden(head, leaf, context), None, chunk_tokens)
        wanted = leaf.grad
    if gradients is not None and norm.grad is not None:
        gradients.norm.add_(norm.grad)
    return HeadsResult(torch.stack([turns.sums[head] for head in model.heads.numbers]), wanted)


@torch.no_grad()
def _chain_inputs(
    model: MultiTokenModel, trunk_output: Tensor, context: LayerContext
) -> list[Tensor]:
    """What each head of a chain reads; the last one need not run for it."""
    inputs = [trunk_output.detach()]
    for head in model.heads.order[:-1]:
        inputs.append(model.heads.hidden(head, inputs[-1], context))
    return inputs


def _asks_gradient(model: MultiTokenModel, trunk_output: Tensor, place: int) -> bool:
    """Whether anything below a place in the chain is trained."""
    below = (model.heads.layers[str(head)] for head in model.heads.order[:place])
    return trunk_output.requires_grad or any(
        parameter.requires_grad for head in below for parameter in head.parameters()
    )


class _Turns:
    """The losses and backwards of single heads.

    Args:
        model: the model or the part of it.
        labels: `[n, B, S]`.
        scales: `[n]`.
        norm: `[H]`, a leaf of its own.
        unembedding: `[V', H]` the shared one, without a graph.
        gradients: of the LM head; None when it is frozen.
        sequence_losses: `[B]` for head 1's; or None.

    Attributes:
        sums: each head's loss sum.
    """

    def __init__(
        self,
        model: MultiTokenModel,
        labels: Tensor,
        scales: Tensor,
        norm: Tensor,
        unembedding: Tensor,
        gradients: LMHeadGradients | None,
        sequence_losses: Tensor | None,
    ) -> None:
        self._sequence_losses = sequence_losses
        self._model = model
        self._labels = labels
        self._scales = scales
        self._norm = norm
        self._unembedding = unembedding
        self._gradients = gradients
        self.sums: dict[int, Tensor] = {}

    def take(
        self, head: int, output: Tensor, output_gradient: Tensor | None, chunk_tokens: int
    ) -> None:
        """One head's loss, and the backward of its output's graph.

        Args:
            head: its number.
            output: `[S, B, H]` of the head, before the norm, with its graph.
            output_gradient: `[S, B, H]` from the heads that read this one.
            chunk_tokens: tokens whose logits exist at once.
        """
        normed = self._model.heads.lm_head.normalize(output, self._norm)
        own = self._model.heads.own_unembedding(head)
        weight, weight_gradient = self._unembedding, None
        if own is not None:
            weight = own.detach()
            if own.requires_grad:
                dtype = torch.promote_types(own.dtype, torch.float32)
                weight_gradient = torch.zeros_like(own, dtype=dtype)
        elif self._gradients is not None:
            weight_gradient = self._gradients.unembedding
        hidden, targets = normed.detach().flatten(0, 1), _sequence_first(self._labels[head - 1])
        if not normed.requires_grad and weight_gradient is None:  # nothing of it is trained
            self.sums[head], _ = loss_and_predictions(
                hidden, weight, targets, shard=self._model.shard, chunk_tokens=chunk_tokens
            )
            return
        wanted = self._sequence_losses if head == 1 else None
        token_losses = None if wanted is None else wanted.new_empty(targets.shape)
        result = loss_and_gradients(
            hidden,
            weight,
            targets,
            shard=self._model.shard,
            scale=self._scales[head - 1],
            weight_gradient=weight_gradient,
            chunk_tokens=chunk_tokens,
            token_losses=token_losses,
            is_compiled=self._model.compiles_kernels,
        )
        if wanted is not None and token_losses is not None:
            add_sequence_losses(wanted, token_losses)
        self.sums[head] = result.loss_sum
        pairs = [(normed, result.hidden_gradient.view_as(normed)), (output, output_gradient)]
        if own is not None and weight_gradient is not None:
            pairs.append((own, weight_gradient.to(own.dtype)))
        pairs = [(t, g) for t, g in pairs if t.requires_grad and g is not None]
        if pairs:
            torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])


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
    context = model.heads_context(trunk_output, documents)
    losses = {}
    for head, hidden in model.heads.outputs(trunk_output, context):
        normed = model.heads.lm_head.normalize(hidden, norm)
        own = model.heads.own_unembedding(head)
        losses[head] = linear_cross_entropy(
            normed.flatten(0, 1),
            unembedding if own is None else own,
            _sequence_first(labels[head - 1]),
            shard=model.shard,
            chunk_tokens=chunk_tokens,
            is_compiled=model.compiles_kernels,
        )
    sums = torch.stack([losses[head] for head in model.heads.numbers])
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
