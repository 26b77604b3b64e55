"""Chains whose drafts are kept although head 1 would have chosen otherwise: faster, another text.

Legend: B rows, k heads in use, S = k positions, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.decoding.acceptance import Verdict, accept_top_k, accept_typical
from model.decoding.chain import ChainDecoder, RowOptions
from model.decoding.choosing import Chooser, Drafts
from model.decoding.sampling import GREEDY, Sampling, draw
from model.inference.network import Network


class LossyRule(NamedTuple):
    """Which drafts are kept.

    Attributes:
        top_k: those among head 1's k likeliest tokens; 0 = by `accept_typical`.
        epsilon: see `accept_typical`; Medusa's value.
        delta: likewise.
    """

    top_k: int = 0
    epsilon: float = 0.09
    delta: float = 0.3


class LossyChooser(Chooser):
    """Chooses first and following tokens as head 1 does, and keeps drafts by a rule.

    Args:
        rule: the rule.
        samplings: how tokens that are no drafts are chosen; drafts are the heads' likeliest.
        seeds: one for each row.
        vocab_size: V.
        device: where the logits are.
    """

    def __init__(
        self,
        rule: LossyRule,
        samplings: Sequence[Sampling],
        seeds: Sequence[int],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        super().__init__(samplings, seeds, vocab_size, device)
        self.rule = rule

    def draft(self, logits: Tensor) -> Drafts:
        """The likeliest token of each head, from logits `[g, B, V]`."""
        return Drafts(logits.argmax(-1).transpose(0, 1), None)

    def verify(self, logits: Tensor, drafts: Drafts) -> Verdict:
        """Which drafts are kept and what follows them, from head 1's logits `[B, S, V]`."""
        logits = self.penalized_along(logits, drafts.tokens)
        target = self.sampling.distributions(logits)
        if self.rule.top_k:
            kept = accept_top_k(logits, drafts.tokens, self.rule.top_k)
        else:
            kept = accept_typical(target, drafts.tokens, self.rule.epsilon, self.rule.delta)
        self.sound = target.sum(-1).isfinite().all(-1)
        rows = torch.arange(len(kept), device=kept.device)
        if self.sampling.greedy:
            return Verdict(kept, logits[rows, kept].argmax(-1))
        chosen = self.sampling.chosen_from(logits)
        return Verdict(kept, draw(chosen[rows, kept], self.uniforms.next(1)[:, 0]))


class LossyDecoder(ChainDecoder):
    """A batch that is decoded by chains of drafts of which too many are kept.

    Class: lossy. Texts are not those of head 1, nor drawn from its distribution; how good they are
    has to be measured, for one by what head 1 thinks of them (`logprobs`).

    Args:
        network: the model.
        heads: k, how many of its heads to use.
        rule: which drafts are kept.
        sampling: how other tokens are chosen.
        seeds: one for each row; 0, 1, .. unless given.
        logprobs: whether to compute them.
    """

    def __init__(
        self,
        network: Network,
        *,
        heads: int,
        rule: LossyRule,
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
        logprobs: bool = False,
    ) -> None:
        super().__init__(network, heads=heads, sampling=sampling, seeds=seeds, logprobs=logprobs)
        self.rule = rule

    def _new_chooser(self, rows: Sequence[RowOptions]) -> Chooser:
        vocab_size = self.network.config.vocab_size
        samplings, seeds = [row.sampling for row in rows], [row.seed for row in rows]
        return LossyChooser(self.rule, samplings, seeds, vocab_size, self.network.device)
