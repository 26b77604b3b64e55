"""Several documents in one row: positions that start again, and attention that stays inside.

Positions alone do not keep documents apart: rotary embeddings only turn queries and keys, and a
query still sees every key before it. It is the mask that does.

Legend: B batch, S sequence.
"""

import torch
from torch import Tensor


def positions_within(documents: Tensor) -> Tensor:
    """Each token's distance from the start of its document, or of the row if that comes later.

    Args:
        documents: `[B, S]` integers, rising along each row: 0, 0, 0, 1, 1, 2.

    Returns:
        `[B, S]` int64; for the row above [0, 1, 2, 0, 1, 0].
    """
    places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    starts = torch.zeros_like(places)
    starts[:, 1:] = places[:, 1:] * (documents[:, 1:] != documents[:, :-1])
    return places - starts.cummax(dim=1).values


def causal_mask_within(documents: Tensor) -> Tensor:
    """Which keys each query sees: those of its own document, up to itself.

    Args:
        documents: `[B, S]` integers, rising along each row.

    Returns:
        `[B, 1, S, S]` bool, queries before keys.
    """
    same = documents.unsqueeze(2) == documents.unsqueeze(1)
    return same.tril().unsqueeze(1)
