"""What the borders of segments mean for the heads: whom they see, and what they are scored on.

Heads read the trunk's output within a segment, so that a stream needs no more than a segment's keys
and values. Their targets are of the stream: those of the last positions lie in the next segment.

Legend: B batch, S sequence, n heads.
"""

import torch
from torch import Tensor

from model.memory.sizes import MemorySizes

_IGNORED = -100


def split_at_segments(
    sizes: MemorySizes, rows: int, length: int, documents: Tensor | None, device: torch.device
) -> Tensor | None:
    """Numbers for tokens that heads may see together: of one segment and of one document.

    Args:
        sizes: of the memory.
        rows: B.
        length: S, from the beginning of a segment on.
        documents: `[B, S]` integers, rising along each sequence, or None.
        device: where the numbers are wanted.

    Returns:
        `[B, S]` integers, rising; None when all of it is one segment of one text.
    """
    if length <= sizes.segment:
        return documents
    segments = torch.arange(length, device=device).expand(rows, -1) // sizes.segment
    if documents is None:
        return segments
    borders = torch.zeros_like(segments)
    documents = documents.to(device)
    changes = documents[:, 1:] != documents[:, :-1]
    borders[:, 1:] = changes | (segments[:, 1:] != segments[:, :-1])
    return borders.cumsum(1)


def scored_labels(sizes: MemorySizes, labels: Tensor) -> Tensor:
    """Labels `[n, B, S]` without those that the memory's mode does not score.

    In `strict_score` the prompt has seen the first j tokens of its segment, and positions before j
    have no targets.
    """
    if sizes.mode != "strict_score":
        return labels
    positions = torch.arange(labels.shape[2], device=labels.device) % sizes.segment
    return labels.masked_fill(positions < sizes.summary, _IGNORED)
