"""A beam of drafts grows by a layer: the likeliest continuations, or drawn ones.

Legend: B rows, w beams, m new ones, N nodes, V vocabulary.
"""

from collections.abc import Collection
from typing import NamedTuple, Self

import torch
from torch import Tensor

from model.decoding.choosing import Chooser
from model.decoding.sampling import draw
from model.joint_decoding.forest import Forest


class Beams(NamedTuple):
    """The ends of what is drafted so far.

    Attributes:
        forest: all that is drafted; several beams may begin alike.
        nodes: `[B, w]` the last node of each beam.
        scores: `[B, w]` logarithmic probability of each from the root on; -inf where there is none.
        finished: `[B, w]` bool, whether its text has ended; such a beam stays as it is.
    """

    forest: Forest
    nodes: Tensor
    scores: Tensor
    finished: Tensor

    @classmethod
    def of_roots(cls, tokens: Tensor, dtype: torch.dtype) -> Self:
        """One beam of each row, that of nothing after the last committed token, `[B]`."""
        forest = Forest.of_roots(tokens, dtype)
        nothing = torch.zeros_like(forest.tokens)
        return cls(forest, nothing, forest.scores, nothing.bool())

    def cells(self, conditional: Tensor) -> Tensor:
        """All continuations of all beams, as `[B, w * V]` scores.

        A beam that is finished has itself as its only one, in the place of token 0.

        Args:
            conditional: `[B, w, V]` logarithmic probabilities of the next token after each.
        """
        scores = self.scores.unsqueeze(-1)
        stays = torch.full_like(conditional, -torch.inf)
        stays[..., 0] = 0
        return (scores + torch.where(self.finished.unsqueeze(-1), stays, conditional)).flatten(1)

    def log_distributions(self, logits: Tensor, chooser: Chooser) -> Tensor:
        """Of the token after each beam, `[B, w, V]`, from logits `[B, w, V]`, as rows choose."""
        size = self.forest.size
        lines = self.forest.ancestors.gather(1, self.nodes.unsqueeze(-1).expand(-1, -1, size))
        logits = chooser.penalized_along(logits, self.forest.tokens[:, 1:], lines[..., 1:])
        return chooser.sampling.log_distributions(logits)

    def grown(self, chosen: Tensor, scores: Tensor, vocab_size: int, ends: Tensor) -> "Beams":
        """The beams of the next layer.

        Args:
            chosen: `[B, m]` cells, see `cells`.
            scores: `[B, m]` theirs; -inf where none could be chosen.
            vocab_size: V.
            ends: tokens that end a text.
        """
        beams, tokens = chosen // vocab_size, chosen % vocab_size
        above, stays = self.nodes.gather(1, beams), self.finished.gather(1, beams)
        first = self.forest.size
        forest = self.forest.grown(above, tokens, scores.masked_fill(stays, -torch.inf))
        new = torch.arange(first, forest.size, device=chosen.device).expand_as(above)
        return Beams(
            forest, torch.where(stays, above, new), scores, stays | torch.isin(tokens, ends)
        )


def choose_cells(cells: Tensor, width: int, chooser: Chooser) -> tuple[Tensor, Tensor]:
    """Beams of the next layer out of all continuations.

    Greedy rows take the best (beam search). Others draw by joint probability over beams and tokens,
    one after the other and none twice (beam sampling).

    Args:
        cells: `[B, w * V]` scores.
        width: how many at most.
        chooser: of the rows, with their random numbers.

    Returns:
        `[B, m]` the cells, and their scores: -inf where nothing was left.
    """
    count = min(width, cells.shape[1])
    best = cells.topk(count, dim=1)
    if chooser.sampling.greedy:
        return best.indices, best.values
    rest = torch.softmax(cells, dim=1)
    drawn, scores = [], []
    for uniform in chooser.uniforms.next(count).unbind(1):
        cell = draw(rest, uniform).unsqueeze(1)
        drawn.append(cell)
        scores.append(cells.gather(1, cell).masked_fill(rest.gather(1, cell) == 0, -torch.inf))
        rest = rest.scatter(1, cell, 0)
    greedy = [[sampling.greedy] for sampling in chooser.sampling.samplings]
    takes_best = torch.tensor(greedy, device=cells.device)
    return (
        torch.where(takes_best, best.indices, torch.cat(drawn, dim=1)),
        torch.where(takes_best, best.values, torch.cat(scores, dim=1)),
    )


def ending_tokens(eos_id: int | Collection[int] | None, device: torch.device) -> Tensor:
    """The tokens that end a text, as a tensor."""
    tokens = [eos_id] if isinstance(eos_id, int) else sorted(eos_id or ())
    return torch.tensor(tokens, dtype=torch.long, device=device)
