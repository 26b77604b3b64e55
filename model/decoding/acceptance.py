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


class SiblingProbabilities(NamedTuple):
    """Speculative sampling of m candidates for one token, as probabilities.

    Attributes:
        accept: `[..., m]` of keeping candidate i, once all before it were not kept.
        following: `[..., m + 1, V]` distribution of the token when the first j were not kept.
    """

    accept: Tensor
    following: Tensor


def accept_siblings(target: Tensor, draft: Tensor, tokens: Tensor) -> SiblingProbabilities:
    """Distribution-exact: the candidate that is kept, or the token instead, has the target's.

    The rule of a chain's draft, one candidate after the other: what is left to be given, first p,
    is held against what the candidate was drawn from, q without those before it. When a candidate
    is not kept, the normalized positive part of the difference is left (recursive rejection
    sampling without replacement, Yang et al. 2024, Jeon et al. 2024).

    Args:
        target: `[..., V]` distribution p of head 1.
        draft: `[..., V]` distribution q of the first candidate, fixed before the draw.
        tokens: `[..., m]` the candidates, drawn one after the other and none twice. Where q had
            no mass left, a candidate may be any token, and is never kept.
    """
    accepts, left = [], [target]
    for column in range(tokens.shape[-1]):
        token, p = tokens[..., column, None], left[-1]
        mass = draft.sum(-1, keepdim=True)
        q = torch.where(mass > 0, draft / mass, 0.0)
        wanted, drawn = p.gather(-1, token), q.gather(-1, token)
        accepts.append(torch.where(drawn > 0, wanted / drawn, 0.0).clamp(max=1.0))
        excess = (p - q).clamp(min=0)
        total = excess.sum(-1, keepdim=True)
        # No excess means p = q up to rounding: then the candidate is kept, and p is as good.
        left.append(torch.where(total > 0, excess / total, p))
        draft = draft.scatter(-1, token, 0.0)
    return SiblingProbabilities(torch.cat(accepts, dim=-1), torch.stack(left, dim=-2))


def leading(right: Tensor) -> Tensor:
    """`[B]` number of true values before the first false one in each row of `[B, g]`."""
    return right.long().cumprod(1).sum(1)


def accept_tree(
    best: Tensor, tokens: Tensor, parents: Tensor, ancestors: Tensor, depths: Tensor
) -> Tensor:
    """Greedy-exact: the deepest node that is reached by head 1's likeliest tokens alone.

    Args:
        best: `[B, N]` the likeliest token after each node.
        tokens: `[B, N]` of the nodes; the root, node 0, is committed already.
        parents: `[N]` of each node, the root's is itself. Children of one node have different
            tokens, so no more than one of them is right.
        ancestors: `[N, N]` bool, true where the column is the row's node or an ancestor of it.
        depths: `[N]`.

    Returns:
        `[B]` numbers of nodes.
    """
    right = tokens == best[:, parents]
    right[:, 0] = True
    reached = (right.unsqueeze(1) | ~ancestors).all(-1)
    return torch.where(reached, depths, -1).argmax(1)


def accept_top_k(logits: Tensor, drafts: Tensor, k: int) -> Tensor:
    """Lossy: drafts are kept while they are among head 1's k likeliest tokens.

    The relaxed rule of blockwise parallel decoding (Stern et al. 2018, section 5.1).

    Args:
        logits: `[B, g + 1, V]` of head 1, draft j's at index j - 1.
        drafts: `[B, g]`.
        k: 1 is greedy-exact.

    Returns:
        `[B]` how many drafts are kept.
    """
    mine = logits[:, :-1].gather(-1, drafts.unsqueeze(-1))
    return leading((logits[:, :-1] > mine).sum(-1) < k)


def accept_typical(target: Tensor, drafts: Tensor, epsilon: float, delta: float) -> Tensor:
    """Lossy: drafts are kept while head 1 finds them likely enough for its own uncertainty.

    Draft d is kept if p(d) > min(epsilon, delta * exp(-H(p))), H the entropy of p (typical
    acceptance of Medusa, Cai et al. 2024).

    Args:
        target: `[B, g + 1, V]` distributions p of head 1, draft j's at index j - 1.
        drafts: `[B, g]`.
        epsilon: a draft more likely than this is always kept.
        delta: how much of exp(-H) is enough.

    Returns:
        `[B]` how many drafts are kept.
    """
    p = target[:, :-1]
    entropy = torch.special.entr(p).sum(-1)
    least = (delta * torch.exp(-entropy)).clamp(max=epsilon)
    return leading(p.gather(-1, drafts.unsqueeze(-1)).squeeze(-1) > least)
