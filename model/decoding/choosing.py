"""Chooses tokens from logits: first tokens, drafts, and which drafts are kept.

Legend: B rows, g drafts of a chain, S = g + 1, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.decoding.acceptance import Verdict, accept_chain, accept_greedy, leading
from model.decoding.sampling import RowSampling, RowUniforms, Sampling, draw


class Drafts(NamedTuple):
    """What the heads propose.

    Attributes:
        tokens: `[B, g]`.
        distributions: `[B, g, V]` what each was drawn from; None when all rows are greedy.
    """

    tokens: Tensor
    distributions: Tensor | None

    def keep(self, order: Sequence[int]) -> "Drafts":
        """Row `order[i]` becomes row i; the others are gone."""
        rows = list(order)
        chances = self.distributions
        return Drafts(self.tokens[rows], None if chances is None else chances[rows])

    def joined(self, other: "Drafts") -> "Drafts":
        """These rows and then those of another one; greedy ones are drawn from what is certain."""
        tokens = torch.cat([self.tokens, other.tokens])
        like = self.distributions if self.distributions is not None else other.distributions
        if like is None:
            return Drafts(tokens, None)
        chances = [
            torch.zeros(
                *drafts.tokens.shape, like.shape[-1], dtype=like.dtype, device=like.device
            ).scatter_(-1, drafts.tokens.unsqueeze(-1), 1)
            if drafts.distributions is None
            else drafts.distributions
            for drafts in (self, other)
        ]
        return Drafts(tokens, torch.cat(chances))


class Chooser:
    """Head 1's way to choose, with what it has to know of each row.

    Args:
        samplings: of each row, greedy or from a distribution.
        seeds: one for each row; of no use when greedy.
        vocab_size: V.
        device: where the logits are.

    Attributes:
        sound: `[B]` bool, whether the last distributions were; not so of infinite logits.
    """

    def __init__(
        self,
        samplings: Sequence[Sampling],
        seeds: Sequence[int],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.sampling = RowSampling(samplings, device)
        self._device = device
        self._vocab_size = vocab_size
        self.sound = torch.ones(len(seeds), dtype=torch.bool, device=device)
        self.uniforms = RowUniforms(seeds, device)
        self._seen = self._nothing_seen() if self.sampling.penalized else None

    def see(self, tokens: Tensor, valid: Tensor) -> None:
        """Note that rows have tokens `[B, S]`, where `valid` `[B, S]` says so."""
        if self._seen is not None:
            counts = torch.zeros(self._seen.shape, dtype=torch.int, device=tokens.device)
            counts.scatter_add_(1, tokens, valid.int())
            self._seen |= counts > 0

    def first(self, logits: Tensor) -> Tensor:
        """The token `[B]` after the prompt, from head 1's logits `[B, V]`."""
        logits = self._penalized(logits.unsqueeze(1))
        if self.sampling.greedy:
            return logits.argmax(-1).squeeze(1)
        target = self.sampling.chosen_from(logits).squeeze(1)
        self.sound = _sound(target)
        return draw(target, self.uniforms.next(1)[:, 0])

    def draft(self, logits: Tensor) -> Drafts:
        """Drafts from logits `[g, B, V]` of heads 2 .. g + 1."""
        logits = self._penalized(logits.transpose(0, 1))
        if self.sampling.greedy:
            return Drafts(logits.argmax(-1), None)
        drafts = self.sampling.chosen_from(logits)
        self.sound = self.sound & _sound(drafts).all(-1)
        return Drafts(draw(drafts, self.uniforms.next(logits.shape[1])), drafts)

    def verify(self, logits: Tensor, drafts: Drafts) -> Verdict:
        """Which drafts are kept and what follows them, from head 1's logits `[B, S, V]`."""
        logits = self.penalized_along(logits, drafts.tokens)
        if self.sampling.greedy:
            return accept_greedy(logits.argmax(-1), drafts.tokens)
        target = self.sampling.chosen_from(logits)
        self.sound = _sound(target).all(-1)
        uniforms = self.uniforms.next(target.shape[1])
        if drafts.distributions is None:
            kept = torch.zeros(len(target), dtype=torch.long, device=target.device)
            return Verdict(kept, draw(target[:, 0], uniforms[:, 0]))
        chain = accept_chain(target, drafts.distributions, drafts.tokens)
        kept = leading(uniforms[:, 1:] < chain.accept)
        rows = torch.arange(len(kept), device=kept.device)
        return Verdict(kept, draw(chain.following[rows, kept], uniforms[:, 0]))

    def keep(self, order: Sequence[int]) -> None:
        """Row `order[i]` becomes row i; the others are gone."""
        rows = list(order)
        samplings = self.sampling.samplings
        self.sampling = RowSampling([samplings[row] for row in rows], self._device)
        self.uniforms.keep(order)
        self.sound = self.sound[rows]
        if self._seen is not None:
            self._seen = self._seen[rows] if self.sampling.penalized else None

    def join(self, other: "Chooser") -> None:
        """Add the rows of another one."""
        # Rows without a penalty need not know what they have.
        seen = [c._nothing_seen() if c._seen is None else c._seen for c in (self, other)]
        samplings = self.sampling.samplings + other.sampling.samplings
        self.sampling = RowSampling(samplings, self._device)
        self._seen = torch.cat(seen) if self.sampling.penalized else None
        self.uniforms.join(other.uniforms)
        self.sound = torch.cat([self.sound, other.sound])

    def _nothing_seen(self) -> Tensor:
        shape = (len(self.sampling.samplings), self._vocab_size)
        return torch.zeros(shape, dtype=torch.bool, device=self._device)

    def _penalized(self, logits: Tensor) -> Tensor:
        """Logits `[B, S, V]`, S heads at one position."""
        if self._seen is None:
            return logits
        return self.sampling.penalized_logits(logits, self._seen.unsqueeze(1))

    def penalized_along(self, logits: Tensor, drafts: Tensor) -> Tensor:
        """Each position counts the drafts before it as tokens that the text has."""
        if self._seen is None:
            return logits
        seen = self._seen.unsqueeze(1).repeat(1, logits.shape[1], 1)
        for column in range(drafts.shape[1]):
            later = seen[:, column + 1 :]
            token = drafts[:, column, None, None].expand(-1, later.shape[1], 1)
            later.scatter_(2, token, True)
        return self.sampling.penalized_logits(logits, seen)


def _sound(distributions: Tensor) -> Tensor:
    """`[...]` whether distributions `[..., V]` are made of numbers."""
    return distributions.sum(-1).isfinite()
