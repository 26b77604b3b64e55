"""The kinds of heads (Gloeckle et al. 2024, appendix B, figure S11), as who reads whose output.

parallel     each head reads the trunk's output
linear       likewise; a head is one linear map and no layer
causal       head 1 reads the trunk's output, head k that of head k-1
anticausal   head n reads the trunk's output, head k that of head k+1: the next token, which
             head 1 predicts, passes all heads
"""

from typing import Literal

HeadKind = Literal["parallel", "causal", "anticausal", "linear"]
LMHeadKind = Literal["shared", "replicated"]


def head_order(kind: HeadKind, num_heads: int) -> range:
    """Heads 1 .. n in the order in which they can be computed, nearest to the trunk first."""
    if kind == "anticausal":
        return range(num_heads, 0, -1)
    return range(1, num_heads + 1)


def is_chain(kind: HeadKind) -> bool:
    """Whether a head reads what the head before it in `head_order` gives."""
    return kind in ("causal", "anticausal")


def next_token_heads(kind: HeadKind, num_heads: int) -> range:
    """The heads that the next token's prediction passes, nearest to the trunk first."""
    return head_order(kind, num_heads) if kind == "anticausal" else range(1, 2)
