"""How far ahead the heads agree: what greedy self-speculation commits, counted without running it.

Legend: B batch, S sequence, n heads.
"""

import torch
from torch import Tensor


def agreement_counts(predictions: Tensor, valid: Tensor) -> Tensor:
    """Positions where the first k heads all predict what head 1 predicts in their place.

    Head k at position t and head 1 at position t + k - 1 predict the same token t + k. With three
    heads, position t counts for k = 3 when head 2 at t equals head 1 at t+1 and head 3 at t equals
    head 1 at t+2. Positions whose comparison would leave the window are left out. A token past the
    end of the position's document is no agreement: decoding stops there.

    Args:
        predictions: `[n, S, B]` most likely tokens.
        valid: `[n, S, B]` bool, whether head k has a target at t: false for padding, and with
            masked documents past the document's end.

    Returns:
        `[n]` counts, never rising; the first is the number of positions compared.
    """
    heads, length = predictions.shape[0], predictions.shape[1]
    compared = length - heads + 1
    agree = valid[0, :compared].clone()
    counts = []
    for index in range(heads):
        agree &= valid[index, :compared]
        agree &= predictions[index, :compared] == predictions[0, index : index + compared]
        counts.append(agree.sum())
    return torch.stack(counts)


def tree_counts(ranks: Tensor, valid: Tensor, most_spread: int) -> Tensor:
    """Positions where a tree of the heads' likeliest tokens has what head 1 predicts.

    A tree of spread s has the paths whose ranks add up to at most s (`model.decoding.tree`).

    Args:
        ranks: `[n, S, B]` how many tokens head k at position t finds likelier than the one that
            head 1 predicts at t + k - 1; anything where there is no such position.
        valid: `[n, S, B]` as in `agreement_counts`.
        most_spread: the largest s.

    Returns:
        `[most_spread, n]` counts for spreads 1, 2, ..: positions where the first k heads' tokens
        are all on one path.
    """
    heads, length = ranks.shape[0], ranks.shape[1]
    compared = length - heads + 1
    sums = ranks[:, :compared].cumsum(dim=0)
    inside = valid[:, :compared].cumprod(dim=0).bool()
    spreads = range(1, most_spread + 1)
    return torch.stack([(inside & (sums <= spread)).sum((1, 2)) for spread in spreads])
