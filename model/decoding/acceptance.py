"""Which drafts are kept: one pure function for each way of decoding.

Decoders are of three classes. *Greedy-exact*: token for token what head 1 alone gives by taking the
likeliest token. *Distribution-exact*: texts have the distribution of texts sampled from head 1
alone. *Lossy*: neither; such a decoder needs measurements of quality.

Legend: B rows, g drafts of a chain, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Verdict(NamedTuple):
    """What became of a block of drafts.

    Attributes:
        kept: `[B]` how many drafts, from the first, are kept.
        following: `[B]` the token after the kept ones.
    """

    kept: Tensor
    following: Tensor


class ChainProbabilities(NamedTuple):
    """Speculative sampling of one chain of g drafts, as probabilities.

    Attributes:
        accept: `[..., g]` of keeping draft j, once all before it were kept.
        following: `[..., g + 1, V]` distribution of the next token when exactly j drafts were kept.
    """

    accept: Tensor
    following: Tensor


def accept_greedy(best: Tensor, drafts: Tensor) -> Verdict:
    """Greedy-exact: drafts are kept while they are head 1's likeliest tokens.

    Args:
        best: `[B, g + 1]` the likeliest token at each position; draft j's at index j - 1.
        drafts: `[B, g]`.
    """
    kept = leading(best[:, :-1] == drafts)
    return Verdict(kept, best.gather(1, kept.unsqueeze(1)).squeeze(1))


def accept_chain(target: Tensor, draft: Tensor, tokens: Tensor) -> ChainProbabilities:
    """Distribution-exact: what is committed has the target's distribution.

    Draft j is kept with probability min(1, p_j(d_j) / q_j(d_j)); at the first that is not, the
    next token comes from the normalized positive part of p_j - q_j; after the last, from p_{g+1}.
    Exact for any q that was fixed before its draw (Leviathan et al. 2023, Chen et al. 2023).

    Args:
        target: `[..., g + 1, V]` distributions p of head 1, draft j's at index j - 1.
        draft: `[..., g, V]` distributions q that the drafts were drawn from.
        tokens: `[..., g]` the drafts.

    Returns:
        Acceptance probabilities and distributions of the following token.
    """
    chosen = tokens.unsqueeze(-1)
    wanted = target[..., :-1, :].gather(-1, chosen).squeeze(-1)
    drawn = draft.gather(-1, chosen).squeeze(-1)
    accept = torch.where(drawn > 0, wanted / drawn, 0.0).clamp(max=1.0)
    excess = (target[..., :-1, :] - draft).clamp(min=0)
    total = excess.sum(-1, keepdim=True)
    # No excess means p = q up to rounding: then the drafts are accepted, and p itself is as good.
    rest = torch.where(total > 0, excess / total, target[..., :-1, :])
    return ChainProbabilities(accept, torch.cat([rest, target[..., -1:, :]], dim=-2))


def leading(right: Tensor) -> Tensor:
    """`[B]` number of true values before the first false one in each row of `[B, g]`."""
    return right.long().cumprod(1).sum(1)
