"""Drafted beams have the law of beam sampling; caches and trees keep up with them."""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch

from model.beams import acceptance, speculative_text
from model.beams.acceptance import Candidate, LayerVerdict, accept_layer
from model.beams.drafters import ModelDrafter
from model.beams.forest import ForestReader, Place, Tree
from model.beams.hypotheses import BeamSettings, Layer, following
from model.beams.speculative import SpeculativeDecoder, speculative_beams
from model.beams.speculative_text import Speculation
from model.decoding.sampling import RowSampling, Sampling
from model.inference.network import Network
from model.inference.prefill import prefill
from tests.model.decoding.test_chain import chi_square
from tests.model.decoding.test_draft_model import logits_after, smaller
from tests.support.tiny_model import tiny_config, tiny_network, tiny_prompts

WARM = Sampling(temperature=1.5)
_ROUND = Speculation(3, min_width=2)
KINDS = [{}, {"head_kind": "causal"}, {"head_kind": "linear"}, {"lm_head": "replicated"}]


def decoder(
    network: Network,
    drafter: Network | None,
    *,
    settings: BeamSettings,
    speculation: Speculation = _ROUND,
) -> SpeculativeDecoder:
    """Over the tiny prompts, which are read."""
    prompts = tiny_prompts()
    return SpeculativeDecoder(network, prompts, settings, speculation, drafter, range(len(prompts)))


def check_caches(decoder: SpeculativeDecoder, drafter: Network | None) -> None:
    """Rows hold what a fresh cache holds of each beam without its last token."""
    beams = [
        (prompt, beam.tokens)
        for prompt, text in zip(decoder.prompts, decoder.texts, strict=True)
        for beam in text.text.live
    ]
    for row, (prompt, tokens) in enumerate(beams):
        read = [*prompt, *tokens[:-1]]
        assert int(decoder.reader.cache.lengths[row]) == len(read)
        check_row(decoder.reader, row, read, decoder.drafter.heads, len(read))
        if drafter is not None:  # which reads the last one again
            assert isinstance(decoder.drafter, ModelDrafter)
            reader = decoder.drafter.reader
            assert int(reader.cache.lengths[row]) == len(read)
            check_row(reader, row, read, 1, len(read) - 1)


def check_row(
    reader: ForestReader, row: int, tokens: Sequence[int], heads: int, places: int
) -> None:
    """The first places of a row, against a cache into which its tokens were read."""
    fresh = reader.network.new_cache(1, len(tokens), heads)
    lengths = torch.tensor([len(tokens)])
    with torch.no_grad():
        prefill(reader.network, fresh, torch.tensor([list(tokens)]), lengths, heads)
    for kept, wanted in zip(reader.cache.buffers, fresh.buffers, strict=True):
        torch.testing.assert_close(kept[row, :places], wanted[0, :places])


@pytest.mark.parametrize("changes", KINDS)
@pytest.mark.parametrize("own", [False, True])
def test_caches_after_any_pattern_are_fresh_ones(changes: dict[str, str], own: bool) -> None:
    """Round after round, whatever was kept, of the heads' drafts and of a second model's."""
    if own and changes:
        return  # a second model uses head 1 alone
    network = tiny_network(tiny_config(**changes))
    drafter = smaller() if own else None
    for distinct in (False, True):
        settings = BeamSettings(3, 12, WARM, distinct=distinct, eos_ids=frozenset({6}))
        rounds = decoder(network, drafter, settings=settings)
        while rounds.going:
            check_caches(rounds, drafter)
            rounds.round()
        patterns = [tuple(text.rounds) for text in rounds.texts]
        assert len(set(patterns)) > 1
        assert max(map(max, patterns)) > 1


def test_a_tree_says_what_its_paths_say() -> None:
    """D7: each node's logits are those of its beam read one token after the other."""
    network = tiny_network(tiny_config())
    prompts = tiny_prompts()[1:4]
    reader = ForestReader(network, 5, 64)
    reader.read(prompts)
    trees = [Tree(3), Tree(4), Tree(5)]
    shapes = [[(0, 1), (0, 2), (1, 7), (2, 8), (3, 9)], [(0, 1)], [(0, 6), (1, 6), (0, 6)]]
    for tree, shape in zip(trees, shapes, strict=True):
        for parent, token in shape:
            tree.add(parent, token)
    read = reader.read_nodes(trees, [0, 0, 0])
    for row, tree in enumerate(trees):
        for node, line in enumerate(tree.lines):
            text = [*prompts[row], *(tree.tokens[number] for number in line)]
            wanted = logits_after(network, [text])
            torch.testing.assert_close(read.at([Place(row, node)]), wanted)
    # A beam that was chosen twice, from a path that does not lie in one piece, and one of a leaf.
    reader.take_paths(trees, [Place(0, 5), Place(0, 5), Place(2, 2), Place(1, 0), Place(0, 4)])
    check_row(reader, 1, [*prompts[0], 3, 1, 7, 9], 1, len(prompts[0]) + 4)
    check_row(reader, 2, [*prompts[2], 5, 6, 6], 1, len(prompts[2]) + 3)
    check_row(reader, 3, [*prompts[1], 4], 1, len(prompts[1]) + 1)
    logits = reader.next([9, 8, 7, 6, 5])
    wanted = logits_after(network, [[*prompts[0], 3, 2, 8, 5]])
    torch.testing.assert_close(logits[4:], wanted)


def test_the_model_drafts_for_itself_without_fail() -> None:
    """D4: all drafts are kept, every layer is W wide, and a round gives one more than it drafts."""
    network = tiny_network(tiny_config())
    for distinct in (False, True):
        settings = BeamSettings(3, 13, WARM, distinct=distinct)
        found = speculative_beams(
            network, tiny_prompts(), settings, Speculation(3, threshold=0.99), drafter=network
        )
        assert found.kept == found.tried
        assert found.rounds == [[1, 4, 4, 4]] * len(tiny_prompts())
        assert found.widths == [[3] * 13] * len(tiny_prompts())
        assert found.forwards == 4
        assert found.draft_forwards == 1 + 3 * 3


@pytest.mark.parametrize("sampling", [WARM, Sampling(temperature=0.9, top_k=6, top_p=0.9)])
def test_scores_are_those_of_the_text_read_again(sampling: Sampling) -> None:
    """D9: of beams that ended anywhere, drafted or drawn."""
    network = tiny_network(tiny_config())
    settings = BeamSettings(4, 11, sampling, eos_ids=frozenset({6, 7}))
    found = speculative_beams(network, tiny_prompts(), settings, Speculation(3), drafter=smaller())
    rows = RowSampling([sampling], network.device)
    for prompt, beams in zip(tiny_prompts(), found.ranked, strict=True):
        for beam in beams:
            text, total = list(prompt), 0.0
            for token, logprob in zip(beam.tokens, beam.logprobs, strict=True):
                layer = following(logits_after(network, [text]), rows).layer([total])
                total = float(layer.scores[0, token])
                assert logprob == pytest.approx(float(layer.logprobs[0, token]))
                text.append(token)
            assert beam.score == pytest.approx(total)
            assert total > -torch.inf
    assert len({len(beam.tokens) for beams in found.ranked for beam in beams}) > 1


def test_texts_of_a_batch_do_not_meet() -> None:
    """Beams of a prompt are the same in any company."""
    network = tiny_network(tiny_config())
    settings = BeamSettings(3, 10, WARM, eos_ids=frozenset({6}))
    for drafter in (None, smaller()):
        run = Speculation(2, threshold=0.5)
        together = speculative_beams(network, tiny_prompts(), settings, run, drafter=drafter)
        for number in (0, 3):
            alone = speculative_beams(
                network, [tiny_prompts()[number]], settings, run, drafter=drafter, seeds=[number]
            )
            assert alone.tokens[0] == together.tokens[number]
            assert alone.widths[0] == together.widths[number]


def test_widths_are_between_their_bounds() -> None:
    """D8: a layer is W_min to W wide, less what has ended; a lower threshold makes wider ones."""
    network = tiny_network(tiny_config())

    def mean_width(threshold: float, least: int) -> float:
        settings = BeamSettings(5, 12, WARM)
        found = speculative_beams(
            network, tiny_prompts(), settings, Speculation(3, threshold, least), drafter=smaller()
        )
        widths = [width for text in found.widths for width in text]
        assert least <= min(widths)
        assert max(widths) <= 5
        return sum(widths) / len(widths)

    assert mean_width(0.9, 1) < mean_width(0.1, 1) < mean_width(0.1, 4) < mean_width(0.9, 5) == 5


def test_one_beam_begins_each_round() -> None:
    """The variant of less memory: a round has one tree for each text, of its likeliest beam."""
    network = tiny_network(tiny_config())
    run = Speculation(3, min_width=3, one_beam=True)
    rounds = decoder(network, smaller(), settings=BeamSettings(3, 12, WARM), speculation=run)
    while rounds.going:
        rounds.round()
        live = [len(text.text.live) for text in rounds.texts if text.text.live]
        assert set(live) <= {1}
        check_caches(rounds, smaller())
    assert all(len(beam.tokens) == 12 for text in rounds.texts for beam in text.text.ended)


@pytest.mark.parametrize(
    ("by_heads", "distinct", "least", "rows"),
    [
        pytest.param(False, False, 2, 700),
        pytest.param(False, False, 1, 700),
        pytest.param(True, False, 2, 4000, marks=pytest.mark.stress),
        pytest.param(True, True, 1, 4000, marks=pytest.mark.stress),
        pytest.param(False, True, 2, 4000, marks=pytest.mark.stress),
        pytest.param(False, False, 1, 8000, marks=pytest.mark.stress),
    ],
)
def test_drafted_beams_have_the_law_of_beam_sampling(
    by_heads: bool, distinct: bool, least: int, rows: int
) -> None:
    """Counts of the best beam of four layers, two of them drafted, fit; the drafter's law not.

    Some of them end before. Drafted layers are as wide as the least, of two drafts: of one beam,
    many drafts of the second are of parents that were not kept.
    """
    drafter = None if by_heads else smaller(3)
    counts = sampled(rows, drafter=drafter, distinct=distinct, least=least)
    settings = short_texts(distinct=distinct)
    law = law_of_the_best(three_tokens(), settings, least)
    assert counts.keys() <= law.keys()
    assert abs(distance(counts, law)) < 5
    assert distance(counts, law_of_the_best(smaller(3), settings, least)) > 10


def upside_down(p: torch.Tensor, q: torch.Tensor, cell: int) -> float:
    """The ratio as it is printed."""
    return min(float(q[cell] / p[cell]), 1.0) if p[cell] > 0 else 1.0


def left_out(
    target: torch.Tensor,
    draft: torch.Tensor,
    candidates: list[Candidate],
    width: int,
    keep: Callable[[float], bool],
    *,
    distinct: bool,
) -> LayerVerdict:
    """Children of parents that were not kept are no trials."""
    there = [number for number, one in enumerate(candidates) if one.cell is not None]
    usable = [candidates[number] for number in there]
    verdict = accept_layer(target, draft, usable, width, keep, distinct=distinct)
    return verdict._replace(kept=[there[number] for number in verdict.kept])


@pytest.mark.parametrize(
    ("place", "wrong", "least", "rows"),
    [
        pytest.param((acceptance, "keeping_chance"), upside_down, 2, 700),
        pytest.param((acceptance, "residual"), lambda p, q: p, 2, 4000, marks=pytest.mark.stress),
        pytest.param(
            (speculative_text, "accept_layer"), left_out, 1, 8000, marks=pytest.mark.stress
        ),
    ],
)
def test_a_wrong_rule_does_not_have_it(
    monkeypatch: pytest.MonkeyPatch,
    place: tuple[object, str],
    wrong: object,
    least: int,
    rows: int,
) -> None:
    """The same counts with a part of the rule as the errata have it."""
    monkeypatch.setattr(*place, wrong)
    counts = sampled(rows, drafter=smaller(3), distinct=False, least=least)
    law = law_of_the_best(three_tokens(), short_texts(distinct=False), least)
    assert distance(counts, law) > 10


def three_tokens() -> Network:
    """A model of three tokens, with two heads to draft."""
    return tiny_network(tiny_config(vocab_size=3, future_tokens=3))


def short_texts(*, distinct: bool) -> BeamSettings:
    """Two beams of up to four tokens, of which the last of the vocabulary ends one."""
    hot = Sampling(temperature=3.0)
    return BeamSettings(2, 4, hot, distinct=distinct, eos_ids=frozenset({2}))


def sampled(
    rows: int, *, drafter: Network | None, distinct: bool, least: int
) -> Counter[tuple[int, ...]]:
    """How often each text was the best; `least` is the width of drafted layers."""
    found = speculative_beams(
        three_tokens(),
        [[1, 2]] * rows,
        short_texts(distinct=distinct),
        Speculation(2, threshold=1.0, min_width=least),
        drafter=drafter,
    )
    assert found.kept[1] > 0
    return Counter(tuple(tokens) for tokens in found.tokens)


def distance(counts: Counter[tuple[int, ...]], law: dict[tuple[int, ...], float]) -> float:
    """Of counts from a law, see `chi_square`."""
    cells = sorted(law)
    observed = torch.tensor([float(counts[cell]) for cell in cells])
    return chi_square(observed, torch.tensor([law[cell] for cell in cells]))


State = tuple[tuple[tuple[tuple[int, ...], float], ...], tuple[tuple[tuple[int, ...], float], ...]]


def law_of_the_best(
    network: Network, settings: BeamSettings, least: int
) -> dict[tuple[int, ...], float]:
    """Law of the text of beam sampling, all draws enumerated; two beams.

    Args:
        network: of three tokens.
        settings: of two beams.
        least: width of all layers but the first and the last, which nobody drafts.
    """
    assert settings.width == 2
    rows = RowSampling([settings.sampling], network.device)
    states: dict[State, float] = {((((), 0.0),), ()): 1.0}
    for depth in range(settings.max_new_tokens):
        after: Counter[State] = Counter()
        for (live, ended), chance in states.items():
            if not live:
                after[live, ended] += chance  # type: ignore[assignment]
                continue
            texts = [[1, 2, *tokens] for tokens, _ in live]
            said = following(logits_after(network, texts), rows)
            layer = said.layer([score for _, score in live])
            width = 2 if depth in (0, settings.max_new_tokens - 1) else least
            width = min(width, 2 - len(ended))
            for pairs, more in layers_after(layer, width, distinct=settings.distinct):
                grown = [
                    ((*live[cell // 3][0], cell % 3), float(layer.scores.flatten()[cell]))
                    for cell in pairs
                ]
                last = depth + 1 == settings.max_new_tokens
                over = tuple(beam for beam in grown if last or beam[0][-1] in settings.eos_ids)
                going = tuple(beam for beam in grown if beam not in over)
                after[going, tuple(sorted((*ended, *over)))] += chance * more  # type: ignore[assignment]
        states = dict(after)
    law: Counter[tuple[int, ...]] = Counter()
    for (_, ended), chance in states.items():
        best = max(ended, key=lambda beam: beam[1] / len(beam[0]) ** settings.length_penalty)
        law[best[0]] += chance  # type: ignore[assignment]
    return {tokens: float(chance) for tokens, chance in law.items()}


def layers_after(
    layer: Layer, count: int, *, distinct: bool
) -> list[tuple[tuple[int, ...], float]]:
    """Unordered draws of some cells, with their probabilities."""
    law = layer.law().tolist()
    found: Counter[tuple[int, ...]] = Counter()
    for cells in itertools.product(range(len(law)), repeat=count):
        if distinct and len(set(cells)) < count:
            continue
        chance, left = 1.0, 1.0
        for cell in cells:
            chance *= law[cell] / left
            left -= law[cell] if distinct else 0.0
        found[tuple(sorted(cells))] += chance  # type: ignore[assignment]
    return list(found.items())
