"""Dynamic-width speculative beam decoding (DSBD, Qin et al. 2024): beams drafted as a forest.

A round drafts some layers of W beams each, as trees that grow from the beams that are there. One
forward of the model reads all trees. Then layer by layer p_beam over the beams kept so far says how
wide the layer is and which of its draft beams are kept, up to the first layer that gets too few:
that one is filled up by draws, and is the round's last. Where all layers have enough, one more
comes from what the model said after the last.

    beams       x1            x2             2 roots
    layer 1     a    b        c              3 drafts; kept: a, c     the layer is 2 wide
    layer 2     d    e   -    f              b's child is a trial that fails; kept: d
    drawn                     g              from what is left: the layer is full, the round ends

Legend: W beams of a layer at most.
"""

from collections.abc import Sequence
from typing import NamedTuple

from model.beams.drafters import Drafter, HeadsDrafter, ModelDrafter
from model.beams.forest import ForestReader, Tree
from model.beams.hypotheses import Beam, BeamSettings, following
from model.beams.speculative_text import Speculation, SpeculativeText
from model.decoding.sampling import RowSampling
from model.inference.network import Network


class SpeculativeGeneration(NamedTuple):
    """What was generated and what it took.

    Attributes:
        ranked: for each prompt its beams, the best one first.
        forwards: of the model, those that read prompts among them.
        draft_forwards: of a second model.
        widths: of each text and layer, how many beams were chosen.
        rounds: of each text, the layers of each forward.
        tried: of each depth, draft beams that were looked at, of all texts.
        kept: of each depth, those that were kept.
    """

    ranked: list[list[Beam]]
    forwards: int
    draft_forwards: int
    widths: list[list[int]]
    rounds: list[list[int]]
    tried: list[int]
    kept: list[int]

    @property
    def tokens(self) -> list[list[int]]:
        """The new tokens of each prompt's best beam."""
        return [list(beams[0].tokens) for beams in self.ranked]

    @property
    def layers_per_forward(self) -> float:
        """Mean layers that a forward after the prompt's gave a text."""
        later = [layers for rounds in self.rounds for layers in rounds[1:]]
        return sum(later) / len(later) if later else 1.0


def speculative_beams(
    network: Network,
    prompts: Sequence[Sequence[int]],
    settings: BeamSettings,
    speculation: Speculation,
    *,
    drafter: Network | None = None,
    seeds: Sequence[int] | None = None,
) -> SpeculativeGeneration:
    """Continue each prompt by its beams, which are drafted.

    Class: distribution-exact with respect to beam sampling: given the layer before, the beams of a
    layer are drawn from p_beam, as many as the layer is wide. With a least width of W all are W
    wide, and texts have the law of `beam_search`. With `one_beam` they have another law.

    Args:
        network: the model.
        prompts: token ids, at least one in each prompt; lengths may differ.
        settings: of every text; not greedy.
        speculation: how beams are drafted.
        drafter: a second model of the same vocabulary; None = the model's own heads draft.
        seeds: one for each prompt; 0, 1, .. unless given.
    """
    assert not settings.sampling.greedy, "beams are drawn, so not at temperature 0"
    assert settings.sampling.repetition_penalty == 1, "beams have no repetition penalty"
    numbers = range(len(prompts)) if seeds is None else seeds
    decoder = SpeculativeDecoder(network, prompts, settings, speculation, drafter, numbers)
    while decoder.going:
        decoder.round()
    return decoder.generation()


class SpeculativeDecoder:
    """A batch of texts; arguments as of `speculative_beams`."""

    def __init__(
        self,
        network: Network,
        prompts: Sequence[Sequence[int]],
        settings: BeamSettings,
        speculation: Speculation,
        drafter: Network | None,
        seeds: Sequence[int],
    ) -> None:
        self.prompts = prompts
        self.texts = [
            SpeculativeText(settings, speculation, seed, network.device) for seed in seeds
        ]
        self._sampling = RowSampling([settings.sampling], network.device)
        depth = speculation.drafts
        assert drafter is not None or depth < network.num_heads, (depth, network.num_heads)
        rows = len(prompts) * settings.width
        # Nodes of a row that has fewer than another are followed by as many that stand for none.
        capacity = max(map(len, prompts)) + settings.max_new_tokens
        capacity += 2 * (1 + depth * settings.width)
        self.drafter: Drafter = (
            HeadsDrafter(depth + 1)
            if drafter is None
            else ModelDrafter(drafter, rows, capacity, depth)
        )
        self.reader = ForestReader(network, rows, capacity, self.drafter.heads)
        logits = self.reader.read(prompts, self.drafter.heads)
        self.drafter.read(prompts, logits)
        said = following(logits[0], self._sampling).split([1] * len(prompts))
        for number, text in enumerate(self.texts):
            text.draw_first(said[number], number)
        rows_now = [place.row for text in self.texts for place in text.places]
        self.reader.take(rows_now)
        self.drafter.begin(rows_now)

    @property
    def going(self) -> bool:
        """Whether any text goes on."""
        return any(text.text.live for text in self.texts)

    def round(self) -> None:
        """Draft, verify in one forward, and go on with the beams that came out."""
        trees, first = [], 0
        for text in self.texts:
            text.begin_round(first)
            trees += [Tree(beam.tokens[-1]) for beam in text.text.live]
            first += len(text.text.live)
        self._draft(trees)
        read = self.reader.read_nodes(trees, [0] * len(trees), self.drafter.heads)
        while judged := [text for text in self.texts if text.unjudged]:
            places = [place for text in judged for place in text.unjudged]
            said = following(read.at(places), self._sampling)
            counts = [len(text.unjudged) for text in judged]
            for text, of_text in zip(judged, said.split(counts), strict=True):
                text.judge(of_text)
        places = [place for text in self.texts if text.text.live for place in text.places]
        if places:
            self.reader.take_paths(trees, places)
            self.drafter.take(trees, places, self.reader, read)

    def _draft(self, trees: Sequence[Tree]) -> None:
        starts = [0] * len(trees)
        for depth in range(self.drafter.depth):
            fronts = [text.front(depth) for text in self.texts]
            places = [place for front in fronts for place in front]
            if not places:
                break
            if depth == 0:
                logits = self.drafter.roots(self._before(), trees)
                logits = logits[[place.row for place in places]]
            else:
                logits = self.drafter.nodes(trees, starts, places)
            starts = [len(tree.tokens) for tree in trees]
            said = following(logits, self._sampling).split([len(front) for front in fronts])
            for text, front, of_text in zip(self.texts, fronts, said, strict=True):
                if front:
                    text.draft(of_text, trees)

    def _before(self) -> list[int]:
        """The token before the last one of each live beam."""
        return [
            beam.tokens[-2] if len(beam.tokens) > 1 else prompt[-1]
            for prompt, text in zip(self.prompts, self.texts, strict=True)
            for beam in text.text.live
        ]

    def generation(self) -> SpeculativeGeneration:
        """What came out."""
        depth = max(len(text.tried) for text in self.texts)
        tried, kept = [0] * depth, [0] * depth
        for text in self.texts:
            for number, (looked, stayed) in enumerate(zip(text.tried, text.kept, strict=True)):
                tried[number] += looked
                kept[number] += stayed
        return SpeculativeGeneration(
            [text.text.ranked() for text in self.texts],
            self.reader.forwards,
            self.drafter.forwards,
            [text.widths for text in self.texts],
            [text.rounds for text in self.texts],
            tried,
            kept,
        )
