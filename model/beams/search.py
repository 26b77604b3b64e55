"""Beam search, and beam sampling: the references, one forward for each token of the beams."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.beams.hypotheses import (
    Beam,
    BeamSettings,
    BeamText,
    Cell,
    Following,
    Layer,
    following,
)
from model.beams.reader import BeamReader
from model.decoding.sampling import RowSampling, RowUniforms, draw
from model.inference.network import Network


class BeamGeneration(NamedTuple):
    """What was generated and what it took.

    Attributes:
        ranked: for each prompt its beams, the best one first.
        forwards: of the model, those that read prompts among them.
        widths: of each text and layer, how many beams were chosen.
    """

    ranked: list[list[Beam]]
    forwards: int
    widths: list[list[int]]

    @property
    def tokens(self) -> list[list[int]]:
        """The new tokens of each prompt's best beam."""
        return [list(beams[0].tokens) for beams in self.ranked]

    @property
    def layers_per_forward(self) -> float:
        """One: a forward gives the next layer of every text."""
        return 1.0


def draw_cells(law: Tensor, count: int, uniforms: RowUniforms, *, distinct: bool) -> list[int]:
    """Numbers of cells that are drawn from a distribution over them.

    Args:
        law: `[cells]`.
        count: how many, at least 1.
        uniforms: of one row.
        distinct: without replacement; fewer are given where no more cells have mass.
    """
    numbers = uniforms.next(count)[0]
    if not distinct:
        return draw(law, numbers).tolist()
    left, drawn = law.clone(), []
    for number in numbers:
        if not bool(left.sum() > 0):
            break
        drawn.append(int(draw(left, number)))
        left[drawn[-1]] = 0
    return drawn


class _Search:
    """Beams of one text, with its random numbers."""

    def __init__(self, settings: BeamSettings, seed: int, device: torch.device) -> None:
        self.text = BeamText(settings)
        self.widths: list[int] = []
        self._uniforms = RowUniforms([seed], device)

    def grow(self, said: Following) -> list[int]:
        """The next layer, from what may follow those live; the parent of each that goes on."""
        text = self.text
        layer = said.layer([beam.score for beam in text.live])
        if text.settings.sampling.greedy:
            self.widths.append(min(text.settings.width, layer.scores.numel()))
            return text.grow_best(layer)
        cells = self._drawn(layer)
        self.widths.append(len(cells))
        return [cells[number].parent for number in text.grow(cells)]

    def _drawn(self, layer: Layer) -> list[Cell]:
        text = self.text
        numbers = draw_cells(
            layer.law(), text.room, self._uniforms, distinct=text.settings.distinct
        )
        return layer.cells(numbers)


def beam_search(
    network: Network,
    prompts: Sequence[Sequence[int]],
    settings: BeamSettings,
    seeds: Sequence[int] | None = None,
) -> BeamGeneration:
    """Continue each prompt by its beams.

    Greedy sampling: the W likeliest beams of each layer, which is beam search; for one beam it is
    greedy-exact. Else beam sampling: each layer is drawn from p_beam, the distribution over all
    continuations of the layer's beams by one token, in proportion to the probability of the whole
    (Qin et al. 2024, section 2). Texts of a batch do not influence one another.

    Args:
        network: the model; its head 1 alone is used.
        prompts: token ids, at least one in each prompt; lengths may differ.
        settings: of every text.
        seeds: one for each prompt; 0, 1, .. unless given.
    """
    numbers = range(len(prompts)) if seeds is None else seeds
    decoder = BeamDecoder(network, prompts, settings, numbers)
    while decoder.going:
        decoder.round()
    return decoder.generation()


class BeamDecoder:
    """A batch of texts that grow by a layer in each round; arguments as of `beam_search`."""

    def __init__(
        self,
        network: Network,
        prompts: Sequence[Sequence[int]],
        settings: BeamSettings,
        seeds: Sequence[int],
    ) -> None:
        assert settings.sampling.repetition_penalty == 1, "beams have no repetition penalty"
        self._searches = [_Search(settings, seed, network.device) for seed in seeds]
        self._sampling = RowSampling([settings.sampling], network.device)
        longest = max(map(len, prompts)) + settings.max_new_tokens
        self.reader = BeamReader(network, len(prompts) * settings.width, longest)
        self._grow(self.reader.read(prompts)[0])

    @property
    def going(self) -> bool:
        """Whether any text goes on."""
        return any(search.text.live for search in self._searches)

    def round(self) -> None:
        """Read the last token of every beam, and let all texts grow by a layer."""
        live = [beam for search in self._searches for beam in search.text.live]
        self._grow(self.reader.next([beam.tokens[-1] for beam in live]))

    def _grow(self, logits: Tensor) -> None:
        """The next layer of each text, from logits `[beams of all texts, V]`."""
        rows, first = [], 0
        counts = [len(search.text.live) for search in self._searches]
        found = following(logits, self._sampling).split(counts)
        for search, said, live in zip(self._searches, found, counts, strict=True):
            if live:
                rows += [first + parent for parent in search.grow(said)]
            first += live
        if rows:
            self.reader.take(rows)

    def generation(self) -> BeamGeneration:
        """What came out."""
        return BeamGeneration(
            [search.text.ranked() for search in self._searches],
            self.reader.forwards,
            [search.widths for search in self._searches],
        )
