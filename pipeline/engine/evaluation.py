"""Validation of the heads: their losses, and how often they agree on the tokens to come.

Legend: B batch, S sequence, H hidden, n heads.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from data_prep.loading.loader import Batch
from model.language_model import MultiTokenModel
from model.loss import IGNORED, add_sequence_losses, loss_and_predictions
from model.operations.agreement import agreement_counts


class EvalResult(NamedTuple):
    """Validation figures; the same on all ranks.

    Attributes:
        head_losses: mean loss of each head, head 1 first.
        tokens_per_forward: expected tokens that greedy self-speculation with all heads commits
            per forward: 1 + the sum over j of the share of positions where heads 2 .. j all
            agree with head 1 (which sees the true text, as a verifier does after acceptance).
        bits_per_byte: each head's loss in bits, over the bytes that its targets spell; None when
            it is not known what tokens spell.
    """

    head_losses: list[float]
    tokens_per_forward: float
    bits_per_byte: list[float] | None = None

    @classmethod
    def from_sums(cls, sums: Tensor, spelled: Tensor | None = None) -> "EvalResult":
        """From what `evaluate_heads` gave, summed over batches and ranks.

        Args:
            sums: `[3 * n]`.
            spelled: `[n]` bytes that each head's targets spell.
        """
        losses, counts, agreed = sums.view(3, -1)
        positions = agreed[0].clamp(min=1)
        bits = None
        if spelled is not None:
            bits = (losses / math.log(2) / spelled.clamp(min=1)).tolist()
        means = (losses / counts.clamp(min=1)).tolist()
        return cls(means, float((agreed / positions).sum()), bits)


def spelled_bytes(labels: Tensor, token_bytes: Tensor) -> Tensor:
    """Bytes that each head's targets spell, `[n]`.

    Args:
        labels: `[n, B, S]`, -100 where ignored.
        token_bytes: `[V]` of each token.
    """
    valid = labels != IGNORED
    return (token_bytes[labels.clamp(min=0)] * valid).sum((1, 2))


def evaluate_heads(
    model: MultiTokenModel,
    trunk_output: Tensor,
    batch: Batch,
    *,
    chunk_tokens: int,
    head_group: dist.ProcessGroup | None = None,
    pass_on: Callable[[Tensor], None] | None = None,
    sequence_losses: Tensor | None = None,
) -> Tensor:
    """Sums over one batch for the heads that this part of the model holds.

    Args:
        model: the model or a part of it that has heads.
        trunk_output: z `[S, B, H]`, or what the first head here reads.
        batch: with the labels of all heads.
        chunk_tokens: tokens whose logits exist at once.
        head_group: the ranks that hold the other heads; None when all are here.
        pass_on: called with the output of the last head here, before the norm.
        sequence_losses: `[B]` float64, gets head 1's loss sum of each sequence added where head 1
            is; or None.

    Returns:
        `[3 * n]`: loss sums, target counts, and positions where heads 1 .. k all agree; zero for
        heads of other ranks, the agreement only where head 1 is.
    """
    context = model.heads_context(trunk_output, batch.documents)
    norm, unembedding = model.heads.lm_head()
    sums = torch.zeros(3, len(batch.labels), dtype=torch.float64, device=trunk_output.device)
    shape = (len(batch.labels), *trunk_output.shape[:2])
    predictions = torch.zeros(shape, dtype=torch.int64, device=trunk_output.device)
    for head, hidden in model.heads.outputs(trunk_output, context):
        if pass_on is not None and head == model.heads.order[-1]:
            pass_on(hidden)
        targets, own = batch.labels[head - 1], model.heads.own_unembedding(head)
        told = sequence_losses if head == 1 else None
        token_losses = None if told is None else told.new_empty(targets.numel())
        loss, best = loss_and_predictions(
            model.heads.lm_head.normalize(hidden, norm).flatten(0, 1),
            unembedding if own is None else own,
            targets.t().flatten(),
            shard=model.shard,
            chunk_tokens=chunk_tokens,
            token_losses=token_losses,
        )
        if told is not None and token_losses is not None:
            add_sequence_losses(told, token_losses)
        sums[0, head - 1] = loss
        sums[1, head - 1] = (targets != IGNORED).sum()
        predictions[head - 1] = best.view(shape[1:])
    if head_group is not None:
        dist.all_reduce(predictions, group=head_group)
    if model.part.owns_lm_head:
        sums[2] = agreement_counts(predictions, (batch.labels != IGNORED).transpose(1, 2))
    return sums.flatten()
