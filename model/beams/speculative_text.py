"""One text of speculative beam decoding: its drafts of a round, and what becomes of them.

Legend: W beams of a layer at most, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.beams.acceptance import Candidate, accept_layer, rests
from model.beams.forest import Place, Tree
from model.beams.hypotheses import Beam, BeamSettings, BeamText, Following, Layer
from model.beams.search import draw_cells
from model.beams.widths import kept_counts, reached_width, trial_chances
from model.decoding.sampling import RowUniforms


class Speculation(NamedTuple):
    """How beams are drafted and how wide layers are.

    Attributes:
        drafts: layers that are drafted in a round; heads draft one each, but the first.
        threshold: t: a layer is as wide as its drafts reach with this probability.
        min_width: the least, where there is room; the width itself = all layers are as wide.
        one_beam: only the likeliest beam begins the next round. Less memory, another law.
    """

    drafts: int
    threshold: float = 0.9
    min_width: int = 1
    one_beam: bool = False


class DraftLayer(NamedTuple):
    """A layer that was drafted for one text.

    Attributes:
        parents: the nodes that it grows from.
        law: `[parents, V]` q_beam.
        drawn: cells of it, in the order of their draws.
        nodes: the same as nodes; None = the beam ends there.
        masses: of the law on the drawn cells.
        rests: what the law has outside of each and of those before it; None = not of use.
    """

    parents: list[Place]
    law: Tensor
    drawn: list[int]
    nodes: list[Place | None]
    masses: list[float]
    rests: list[float | None]


class SpeculativeText:
    """The beams of one text, and the drafts of a round.

    Args:
        settings: of the text.
        speculation: of the round.
        seed: of its random numbers.
        device: where laws are.

    Attributes:
        text: the beams.
        places: of each live beam, the node that its last token follows.
        unjudged: the nodes of the beams whose next layer is to be judged; none = the round is over.
        widths: of every layer.
        rounds: layers of each round.
        tried: of each depth, candidates that were looked at.
        kept: of each depth, those that were kept.
    """

    def __init__(
        self, settings: BeamSettings, speculation: Speculation, seed: int, device: torch.device
    ) -> None:
        self.text = BeamText(settings)
        self.places: list[Place] = []
        self.unjudged: list[Place] = []
        self.widths: list[int] = []
        self.rounds: list[int] = []
        self.tried: list[int] = []
        self.kept: list[int] = []
        self._speculation = speculation
        self._uniforms = RowUniforms([seed], device)
        self._drafted: list[DraftLayer] = []
        self._judged = 0
        self._front: list[tuple[Place, Beam]] = []

    def begin_round(self, first_row: int) -> None:
        """Its beams are the roots of the rows from `first_row` on; nothing is drafted yet."""
        self._drafted = []
        self._judged = 0
        self.unjudged = [Place(first_row + number, 0) for number in range(len(self.text.live))]
        self._front = list(zip(self.unjudged, self.text.live, strict=True))

    def front(self, depth: int) -> list[Place]:
        """The nodes from which the next layer is drafted; none where it would be of no use.

        Args:
            depth: how many layers were drafted.
        """
        return [place for place, _ in self._front] if self.text.layers_left > depth + 1 else []

    def draft(self, said: Following, trees: Sequence[Tree]) -> None:
        """Draw W beams of the next layer from the drafter's p_beam; they become nodes.

        Args:
            said: by the drafter, of the front.
            trees: of all rows.
        """
        settings = self.text.settings
        layer = said.layer([beam.score for _, beam in self._front])
        law = layer.law()
        drawn = draw_cells(law, settings.width, self._uniforms, distinct=settings.distinct)
        nodes: list[Place | None] = []
        front = []
        for cell in layer.cells(drawn):
            (row, node), parent = self._front[cell.parent]
            beam = Beam((*parent.tokens, cell.token), cell.score)
            if self.text.ends(beam.tokens):
                nodes.append(None)
                continue
            place = Place(row, trees[row].add(node, cell.token))
            nodes.append(place)
            front.append((place, beam))
        parents = [place for place, _ in self._front]
        masses = law[drawn].tolist()
        outside = rests(law, drawn) if settings.distinct else [None] * len(drawn)
        self._drafted.append(
            DraftLayer(parents, law.view(layer.scores.shape), drawn, nodes, masses, outside)
        )
        self._front = front

    def judge(self, said: Following) -> None:
        """Grow the beams by a layer: of drafts, while layers are filled by them, then a drawn one.

        Args:
            said: by the model, of the nodes `unjudged`.
        """
        depth, layer = self._judged, said.layer([beam.score for beam in self.text.live])
        self._judged += 1
        if depth < len(self._drafted):
            self.unjudged = self._verify_layer(depth, self._drafted[depth], layer)
        else:
            self._draw_layer(layer, self.unjudged)
            self.unjudged = []
        if not self.unjudged:
            self._end_round()

    def draw_first(self, said: Following, row: int) -> None:
        """The layer after the prompt, which nobody drafts."""
        self._draw_layer(said.layer([beam.score for beam in self.text.live]), [Place(row, 0)])
        self.rounds.append(1)

    def _end_round(self) -> None:
        self.rounds.append(self._judged)
        if self._speculation.one_beam and self.text.live:
            self._keep_best()

    def _draw_layer(self, layer: Layer, places: Sequence[Place]) -> None:
        """A layer without drafts is W wide."""
        text = self.text
        drawn = draw_cells(layer.law(), text.room, self._uniforms, distinct=text.settings.distinct)
        self._grow(layer, drawn, places)

    def _grow(self, layer: Layer, numbers: Sequence[int], places: Sequence[Place]) -> list[int]:
        """Grow by cells; which of them go on."""
        cells = layer.cells(numbers)
        self.widths.append(len(cells))
        going = self.text.grow(cells)
        self.places = [places[cells[number].parent] for number in going]
        return going

    def _verify_layer(self, depth: int, drafted: DraftLayer, layer: Layer) -> list[Place]:
        """Grow by one layer; the nodes of its beams if it was filled by drafts, else none.

        Args:
            depth: of the layer, from 0.
            drafted: its drafts.
            layer: what the model says of it.
        """
        places, target, vocabulary = self.unjudged, layer.law(), layer.scores.shape[1]
        number = {place: index for index, place in enumerate(drafted.parents)}
        draft = drafted.law[[number[place] for place in places]].flatten()
        beam_of = {number[place]: index for index, place in enumerate(places)}
        candidates = []
        for cell, mass, rest in zip(drafted.drawn, drafted.masses, drafted.rests, strict=True):
            beam = beam_of.get(cell // vocabulary)
            here = None if beam is None else beam * vocabulary + cell % vocabulary
            candidates.append(Candidate(here, mass, rest))
        width = self._width(target, draft, len(candidates))
        distinct = self.text.settings.distinct
        verdict = accept_layer(target, draft, candidates, width, self._tossed, distinct=distinct)
        self._count(depth, verdict.tried, len(verdict.kept))
        cells = [candidates[number].cell for number in verdict.kept]
        kept = [cell for cell in cells if cell is not None]  # none of them is
        if len(kept) == width:
            going = self._grow(layer, kept, places)
            nodes = [drafted.nodes[verdict.kept[n]] for n in going]
            return [place for place in nodes if place is not None]
        kept += draw_cells(verdict.next, 1, self._uniforms, distinct=distinct)
        later = verdict.later
        if distinct:
            later = later.clone()
            later[kept[-1]] = 0
        if len(kept) < width and bool(later.sum() > 0):
            kept += draw_cells(later, width - len(kept), self._uniforms, distinct=distinct)
        self._grow(layer, kept, places)
        return []

    def _width(self, target: Tensor, draft: Tensor, trials: int) -> int:
        """W_L of a layer: what its drafts reach, at least the least and at most the room."""
        least, most = self._speculation.min_width, self.text.room
        if least >= most:
            return most
        counts = kept_counts([float(c) for c in trial_chances(target, draft, trials)])
        return min(max(least, reached_width(counts, self._speculation.threshold)), most)

    def _tossed(self, chance: float | Tensor) -> bool:
        return float(self._uniforms.next(1)) < float(chance)

    def _count(self, depth: int, tried: int, kept: int) -> None:
        if depth == len(self.tried):
            self.tried.append(0)
            self.kept.append(0)
        self.tried[depth] += tried
        self.kept[depth] += kept

    def _keep_best(self) -> None:
        live = self.text.live
        best = max(range(len(live)), key=lambda n: live[n].score)
        self.text.live, self.places = [live[best]], [self.places[best]]
