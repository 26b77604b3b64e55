"""The beams of one text: those that go on, those that have ended, and which is the best.

Legend: W beams that are kept at most, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.decoding.chain import unsound
from model.decoding.sampling import GREEDY, RowSampling, Sampling
from model.decoding.stopping import StopStrings


class BeamSettings(NamedTuple):
    """How the beams of a text grow and end.

    Attributes:
        width: W.
        max_new_tokens: limit of each beam, at least 1.
        sampling: what makes a model's distribution; greedy ones keep the likeliest beams, others
            draw them. Without a repetition penalty.
        distinct: drawn beams are drawn without replacement, so that none is there twice.
        length_penalty: ended beams are compared by their score over length ^ this.
        eos_ids: tokens that end a beam.
        stop: ends a beam with the token that completes one of its strings.
    """

    width: int
    max_new_tokens: int
    sampling: Sampling = GREEDY
    distinct: bool = False
    length_penalty: float = 1.0
    eos_ids: frozenset[int] = frozenset()
    stop: StopStrings | None = None


class Beam(NamedTuple):
    """A continuation of the prompt.

    Attributes:
        tokens: its new tokens.
        score: sum of their logarithmic probabilities in the distributions that the sampling makes.
        logprobs: of each token by head 1 itself, before temperature and filters.
    """

    tokens: tuple[int, ...] = ()
    score: float = 0.0
    logprobs: tuple[float, ...] = ()

    def normalized(self, length_penalty: float) -> float:
        """The score by which ended beams are compared."""
        return self.score / float(len(self.tokens) ** length_penalty)


class Cell(NamedTuple):
    """A beam and a token that may follow it.

    Attributes:
        parent: number of the beam among those that go on.
        token: what follows.
        score: of both.
        logprob: of the token, by head 1 itself.
    """

    parent: int
    token: int
    score: float
    logprob: float


class Layer(NamedTuple):
    """What a model says of every continuation of some beams by one token.

    Attributes:
        scores: `[beams, V]` in fp64; minus infinity = cannot follow.
        logprobs: `[beams, V]` of the token alone, by head 1 itself.
    """

    scores: Tensor
    logprobs: Tensor

    def cells(self, numbers: Sequence[int]) -> list[Cell]:
        """Cells by their numbers, counted along the rows."""
        flat = torch.tensor(list(numbers), dtype=torch.long, device=self.scores.device)
        scores, own = self.scores.flatten()[flat].tolist(), self.logprobs.flatten()[flat].tolist()
        vocabulary = self.scores.shape[1]
        return [
            Cell(number // vocabulary, number % vocabulary, score, logprob)
            for number, score, logprob in zip(numbers, scores, own, strict=True)
        ]

    def law(self) -> Tensor:
        """`[beams * V]` the distribution of a beam of the next layer: p_beam, from the scores."""
        return self.scores.flatten().softmax(0)


class Following(NamedTuple):
    """What a model says may follow some beams, in logarithms and fp64.

    Attributes:
        chosen: `[beams, V]` the distributions that the sampling makes.
        own: `[beams, V]` those of head 1 itself.
    """

    chosen: Tensor
    own: Tensor

    def split(self, counts: Sequence[int]) -> "list[Following]":
        """Of the first so many beams, of the next so many, .."""
        pairs = zip(self.chosen.split(list(counts)), self.own.split(list(counts)), strict=True)
        return [Following(chosen, own) for chosen, own in pairs]

    def layer(self, scores: Sequence[float]) -> Layer:
        """The layer after the beams, which have these scores."""
        before = torch.tensor(list(scores), dtype=torch.float64, device=self.own.device)
        return Layer(before.unsqueeze(1) + self.chosen, self.own)


def following(logits: Tensor, sampling: RowSampling) -> Following:
    """What may follow beams of any texts.

    Args:
        logits: `[beams, V]` after each, by head 1.
        sampling: of every text.

    Raises:
        CheckpointError: the logits are not finite.
    """
    logits = logits.double()
    own = logits.log_softmax(-1)
    chosen = own
    if not sampling.greedy:
        chosen = sampling.log_distributions(logits.unsqueeze(0)).squeeze(0)
    if bool(chosen.isnan().any()):
        raise unsound()
    return Following(chosen, own)


class BeamText:
    """The beams of one text.

    Args:
        settings: how they grow and end.

    Attributes:
        settings: as given.
        live: beams that go on, all of one length.
        ended: the others that still count.
    """

    def __init__(self, settings: BeamSettings) -> None:
        self.settings = settings
        self.live = [Beam()]
        self.ended: list[Beam] = []

    @property
    def room(self) -> int:
        """How many beams of the next layer may be drawn: an ended one keeps its place."""
        return self.settings.width - len(self.ended)

    @property
    def layers_left(self) -> int:
        """Tokens that the live beams may still get."""
        return self.settings.max_new_tokens - len(self.live[0].tokens) if self.live else 0

    def ends(self, tokens: Sequence[int]) -> bool:
        """Whether a beam of these new tokens has ended."""
        settings = self.settings
        return (
            tokens[-1] in settings.eos_ids
            or len(tokens) >= settings.max_new_tokens
            or (settings.stop is not None and settings.stop.complete(tokens))
        )

    def grow(self, cells: Sequence[Cell]) -> list[int]:
        """Let drawn beams be the next layer.

        Returns:
            Which of the cells go on.
        """
        beams = [self._grown(cell) for cell in cells]
        ended = [self.ends(beam.tokens) for beam in beams]
        self.ended += [beam for beam, has in zip(beams, ended, strict=True) if has]
        self.live = [beam for beam, has in zip(beams, ended, strict=True) if not has]
        return [number for number, has in enumerate(ended) if not has]

    def grow_best(self, layer: Layer) -> list[int]:
        """Let the likeliest beams be the next layer, of beam search.

        W beams go on; what ends is kept if it is among the W likeliest cells, and then among the W
        best that have ended. The text is done when none of those that go on is better than any of
        these, compared at its present length.

        Returns:
            The parent of each beam that goes on.
        """
        settings, most = self.settings, layer.scores.numel()
        looked_at = (1 + max(1, len(settings.eos_ids))) * settings.width
        while True:
            best = layer.scores.flatten().topk(min(looked_at, most))
            cells = layer.cells(best.indices.tolist())
            beams = [self._grown(cell) for cell in cells]
            ended = [self.ends(beam.tokens) for beam in beams]
            # Tokens that complete a stop string may be any number of the likeliest.
            few = ended.count(False) < settings.width
            if not few or looked_at >= most or self.layers_left == 1:
                break
            looked_at *= 4
        self.ended += [beams[n] for n in range(min(settings.width, len(beams))) if ended[n]]
        self.ended = self.ranked()[: settings.width]
        going = [n for n, has in enumerate(ended) if not has][: settings.width]
        if going and len(self.ended) == settings.width:
            worst = self.ended[-1].normalized(settings.length_penalty)
            if beams[going[0]].normalized(settings.length_penalty) <= worst:
                going = []
        self.live = [beams[n] for n in going]
        return [cells[n].parent for n in going]

    def ranked(self) -> list[Beam]:
        """The ended beams, the best one first."""
        penalty = self.settings.length_penalty
        return sorted(self.ended, key=lambda beam: -beam.normalized(penalty))

    def _grown(self, cell: Cell) -> Beam:
        parent = self.live[cell.parent]
        return Beam((*parent.tokens, cell.token), cell.score, (*parent.logprobs, cell.logprob))
