"""Chooses tokens from logits: first tokens, drafts, and which drafts are kept.

Legend: B rows, g drafts of a chain, S = g + 1, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.decoding.acceptance import (
    Verdict,
    accept_chain,
    accept_greedy,
    accept_siblings,
    leading,
)
from model.decoding.sampling import RowSampling, RowUniforms, Sampling, draw


class Drafts(NamedTuple):
    """What the heads propose.

    Attributes:
        tokens: `[B, g]`; of a tree `[B, g, m]`, the m candidates of each depth as they were drawn.
        distributions: `[B, g, V]` what each, or the first of each depth, was drawn from; None when
            all rows are greedy.
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
        return Drafts(tokens, torch.cat([self._chances(like), other._chances(like)]))

    def _chances(self, like: Tensor) -> Tensor:
        """The distributions; of greedy rows with everything on the token, or the first of each."""
        if self.distributions is not None:
            return self.distributions
        first = self.tokens if self.tokens.dim() == 2 else self.tokens[..., 0]
        chances = like.new_zeros(*first.shape, like.shape[-1])
        return chances.scatter_(-1, first.unsqueeze(-1), 1)


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

    def candidates(self, logits: Tensor, count: int) -> Drafts:
        """Drafts of a tree, m for each depth and none twice, from logits `[g, B, V]`.

        Greedy rows have the likeliest ones; where all are greedy, that is. Beside sampled rows the
        first is, and the others are of no use.
        """
        logits = self._penalized(logits.transpose(0, 1))
        if self.sampling.greedy:
            return Drafts(logits.topk(count, dim=-1).indices, None)
        distributions = self.sampling.chosen_from(logits)
        self.sound = self.sound & _sound(distributions).all(-1)
        rest = distributions.clone()
        uniforms = self.uniforms.next(rest.shape[1] * count).unflatten(1, (-1, count))
        drawn = []
        for number in range(count):
            drawn.append(draw(rest, uniforms[..., number]))
            rest.scatter_(-1, drawn[-1].unsqueeze(-1), 0)
        return Drafts(torch.stack(drawn, dim=-1), distributions)

    def verify_tree(
        self, logits: Tensor, drafts: Drafts, children: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Walk down from the root, a child being kept or not as drafts of a chain are.

        Args:
            logits: `[B, N, V]` of head 1, after `penalized_along`.
            drafts: from `candidates`; rows are not all greedy.
            children: `[N, m]` nodes below each, by the candidate that they stand for; -1 = none.

        Returns:
            `[B]` the last node that is kept, and `[B]` the token that follows it.
        """
        target = self.sampling.chosen_from(logits)
        self.sound = _sound(target).all(-1)
        chances = drafts.distributions
        depths, count = (0, 0) if chances is None else drafts.tokens.shape[1:]
        uniforms = self.uniforms.next(1 + depths * count)
        rows = torch.arange(len(target), device=target.device)
        node, going = torch.zeros_like(rows), torch.ones_like(rows, dtype=torch.bool)
        last = target[:, 0]
        for depth, q in enumerate([] if chances is None else chances.unbind(1)):
            below = children[node]
            found = accept_siblings(target[rows, node], q, drafts.tokens[:, depth])
            mine = uniforms[:, 1 + depth * count : 1 + (depth + 1) * count]
            right = (mine < found.accept) & (below >= 0) & going.unsqueeze(1)
            kept = right.any(1)
            ends = (going & ~kept).unsqueeze(1)
            last = torch.where(ends, found.following[rows, (below >= 0).sum(1)], last)
            node = torch.where(kept, below[rows, right.long().argmax(1)], node)
            going = kept
        last = torch.where(going.unsqueeze(1), target[rows, node], last)
        return node, draw(last, uniforms[:, 0])

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

    def penalized_along(self, logits: Tensor, drafts: Tensor, sees: Tensor | None = None) -> Tensor:
        """Each position counts the drafts before it as tokens that the text has.

        Args:
            logits: `[B, S, V]` of head 1.
            drafts: `[B, g]`.
            sees: `[S, g]` or `[B, S, g]` bool, which drafts a position counts; None = a chain's.
        """
        if self._seen is None:
            return logits
        positions = logits.shape[1]
        if sees is None:
            sees = torch.ones(positions, positions, dtype=torch.bool, device=logits.device)
            sees = sees.tril()[:, 1:]
        counts = torch.zeros(logits.shape, dtype=torch.int, device=logits.device)
        tokens = drafts.unsqueeze(1).expand(-1, positions, -1)
        counts.scatter_add_(2, tokens, sees.int().expand_as(tokens))
        return self.sampling.penalized_logits(logits, self._seen.unsqueeze(1) | (counts > 0))


def _sound(distributions: Tensor) -> Tensor:
    """`[...]` whether distributions `[..., V]` are made of numbers."""
    return distributions.sum(-1).isfinite()
