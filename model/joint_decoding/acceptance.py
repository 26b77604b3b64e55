"""Which draft is kept by its joint probability: a pure function, in the logarithmic domain.

Legend: B rows, N nodes.
"""

import math

import torch
from torch import Tensor


def accept_joint(target: Tensor, draft: Tensor, depths: Tensor, threshold: float) -> Tensor:
    """Lossy: the deepest node whose path the target finds likely enough, as a whole.

    With P and Q the probabilities of all tokens from the root to a node under target and drafter,
    a node passes if min(1, P / Q) > tau (MTAD of Qin et al. 2024); of several nodes of one depth, Q
    is the largest of theirs. The deepest node that passes is kept, with all before it, whether
    they pass or not; of several the one of the largest P. The root always passes. So tau = 1 keeps
    nothing, and tau = 0 everything, even where the target gives it no probability.

    Args:
        target: `[..., N]` log P of each node; node 0 is the root.
        draft: `[..., N]` log Q; -inf where there is no node.
        depths: `[..., N]` or `[N]`, the root's is 0.
        threshold: tau, 0 or more.

    Returns:
        `[...]` numbers of nodes.
    """
    depths = depths.expand(draft.shape)
    alike = depths.unsqueeze(-1) == depths.unsqueeze(-2)
    largest = torch.where(alike, draft.unsqueeze(-2), -torch.inf).amax(-1)
    passes = draft > -torch.inf
    if threshold > 0:
        passes &= (target - largest).clamp(max=0) > math.log(threshold)
    passes[..., 0] = True
    deepest = depths == torch.where(passes, depths, -1).amax(-1, keepdim=True)
    best = torch.where(passes & deepest, target, -torch.inf)
    # Nodes that do not pass are no better than one that passes with a P of 0.
    tied = passes & deepest & (best == best.amax(-1, keepdim=True))
    return tied.to(torch.uint8).argmax(-1)
