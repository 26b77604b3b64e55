"""Which draft beams are kept, all branches enumerated in fractions, and forms that are wrong."""

import itertools
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
import torch

from model.beams import acceptance
from model.beams.acceptance import Candidate, accept_layer, rests
from model.decoding.acceptance import accept_chain
from tests.support.exact_laws import (
    Array,
    added,
    branches,
    draws,
    exact,
    marginal,
    product_law,
)

P, Q = exact(5, 3, 2), exact(2, 2, 6)
Beams = tuple[int, ...]


def layer_law(
    p: Array, q: Array, trials: int, width: int, *, distinct: bool = False, drawn: bool = False
) -> dict[Beams, Fraction]:
    """Law of a layer's beams in their order, through the function that decoding uses.

    Args:
        p: of beams.
        q: of candidates.
        trials: candidates.
        width: of the layer.
        distinct: candidates and beams are without replacement.
        drawn: candidates are, though the function is not told.
    """

    def outcomes() -> Iterator[tuple[Beams, Fraction]]:
        for cells, chance in draws(q, trials, distinct=distinct or drawn):
            candidates = [Candidate(cell, q[cell]) for cell in cells]
            for verdict, branch in branches(
                partial(accept_layer, p, q, candidates, width, distinct=distinct)
            ):
                kept = [cells[number] for number in verdict.kept]
                for beams, more in filled(kept, verdict.next, verdict.later, width, distinct):
                    yield beams, chance * branch * more

    return added(outcomes())


def filled(
    kept: list[int], following: Array, later: Array, width: int, distinct: bool
) -> Iterator[tuple[Beams, Fraction]]:
    """A layer that gets what it lacks."""
    if len(kept) == width:
        yield tuple(kept), Fraction(1)
        return
    for cell in range(len(following)):
        if not following[cell]:
            continue
        rest = acceptance.without(later, cell) if distinct else later
        for others, chance in draws(rest, width - len(kept) - 1, distinct=distinct):
            yield (*kept, cell, *others), following[cell] * chance


@pytest.mark.parametrize("distinct", [False, True])
@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("trials", [1, 2, 3, 4])
def test_a_layer_is_drawn_from_its_law(trials: int, width: int, distinct: bool) -> None:
    """D1: beams are draws from p, in order and independent, or without replacement."""
    if distinct and trials > 3:
        return  # there are three cells
    for p, q in ((P, Q), (Q, P), (P, P)):
        found = layer_law(p, q, trials, width, distinct=distinct)
        assert found == product_law(p, width, distinct=distinct)


def test_wrong_forms_give_another_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """The errata: the ratio as printed, and draws without replacement that q does not know of."""
    assert marginal(layer_law(P, Q, 2, 2, drawn=True), 3) != list(P)
    right = acceptance.keeping_chance
    monkeypatch.setattr(acceptance, "keeping_chance", lambda p, q, cell: right(q, p, cell))
    for trials in (1, 4):
        assert marginal(layer_law(P, Q, trials, 2), 3) != list(P)


def test_without_a_residual_the_law_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate that is not kept changes what the next one is held against."""
    monkeypatch.setattr(acceptance, "residual", lambda p, q: p)
    assert layer_law(P, Q, 2, 1) != product_law(P, 1)


def test_disjoint_laws_keep_nothing() -> None:
    """D5: no candidate is kept, and beams are draws from p all the same."""
    p, q = exact(6, 4, 0), exact(0, 0, 10)
    candidates = [Candidate(2, q[2])] * 3
    verdict = accept_layer(p, q, candidates, 2, lambda chance: chance > 0)
    assert verdict.kept == []
    assert verdict.tried == 3
    assert layer_law(p, q, 3, 2) == product_law(p, 2)


def test_equal_laws_keep_all() -> None:
    """D4: each candidate is kept for certain."""
    verdict = accept_layer(P, P, [Candidate(2, P[2])] * 3, 3, lambda chance: chance == 1)
    assert verdict.kept == [0, 1, 2]


def test_one_beam_is_speculative_sampling() -> None:
    """D6: chance and what is drawn instead are those of a chain's draft."""
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    for token in range(3):
        chain = accept_chain(torch.stack([p, p]), q.unsqueeze(0), torch.tensor([token]))
        chances: list[float] = []

        def refuse(chance: float, asked: list[float] = chances) -> bool:
            asked.append(float(chance))
            return False

        verdict = accept_layer(p, q, [Candidate(token, q[token])], 1, refuse)
        assert chances == [float(chain.accept[0])]
        torch.testing.assert_close(verdict.next, chain.following[0])


# Two layers: what a model says after each text of one token, and what it says first.
FIRST_P, FIRST_Q = exact(7, 3), exact(4, 6)
AFTER_P = {0: exact(2, 8), 1: exact(9, 1)}
AFTER_Q = {0: exact(5, 5), 1: exact(3, 7)}
Scheme = Callable[[list[Candidate], Array], tuple[list[Candidate], Array]]
Layers = tuple[tuple[int, ...], tuple[tuple[int, int], ...]]


def null_trials(candidates: list[Candidate], q: Array) -> tuple[list[Candidate], Array]:
    """As decoding does it."""
    return candidates, q


def conditional(candidates: list[Candidate], q: Array) -> tuple[list[Candidate], Array]:
    """Children of parents that were not kept are left out, and q is that of the others."""
    total = q.sum()
    return [c for c in candidates if c.cell is not None], q / total if total else q


def filtered(candidates: list[Candidate], q: Array) -> tuple[list[Candidate], Array]:
    """They are left out, and q stays: Algorithm 1 as it is printed."""
    return [c for c in candidates if c.cell is not None], q


def second_law(parents: list[int], first: Array, after: dict[int, Array]) -> Array:
    """p_beam of the cells of some beams of one token."""
    cells = exact(*(10 * first[beam] * chance for beam in parents for chance in after[beam]))
    return cells / cells.sum()


def two_layers(width: int, trials: int, scheme: Scheme) -> dict[Layers, Fraction]:
    """Law of the beams of both layers, of which both are drafted."""

    def outcomes() -> Iterator[tuple[Layers, Fraction]]:
        for drafts, chance in draws(FIRST_Q, trials):
            q = second_law(drafts, FIRST_Q, AFTER_Q)
            first = [Candidate(token, FIRST_Q[token]) for token in drafts]
            for verdict, branch in branches(partial(accept_layer, FIRST_P, FIRST_Q, first, width)):
                kept = [drafts[number] for number in verdict.kept]
                if len(kept) < width:  # the second layer is drawn in the next round
                    for beams, more in filled(kept, verdict.next, verdict.later, width, False):
                        p = second_law([*beams], FIRST_P, AFTER_P)
                        for cells, last in draws(p, width):
                            yield named(beams, cells), chance * branch * more * last
                    continue
                for second, more in second_layer(q, verdict.kept, kept, trials, width, scheme):
                    yield named(tuple(kept), second), chance * branch * more

    return added(outcomes())


def second_layer(
    q: Array, nodes: list[int], beams: list[int], trials: int, width: int, scheme: Scheme
) -> Iterator[tuple[list[int], Fraction]]:
    """Cells of the second layer, by the drafts of all of the first layer's."""
    p = second_law(beams, FIRST_P, AFTER_P)
    among = exact(*(10 * q[2 * node + token] for node in nodes for token in range(2)))
    for cells, chance in draws(q, trials):
        candidates = [
            Candidate(2 * nodes.index(c // 2) + c % 2 if c // 2 in nodes else None, q[c])
            for c in cells
        ]
        usable, law = scheme(candidates, among)
        for verdict, branch in branches(partial(accept_layer, p, law, usable, width)):
            kept = [usable[number].cell for number in verdict.kept]
            kept_cells = [cell for cell in kept if cell is not None]
            for full, more in filled(kept_cells, verdict.next, verdict.later, width, False):
                yield [*full], chance * branch * more


def named(beams: tuple[int, ...], cells: Any) -> Layers:
    """Both layers as texts."""
    return beams, tuple((beams[cell // 2], cell % 2) for cell in cells)


def beam_sampling(width: int) -> dict[Layers, Fraction]:
    """The law that both layers are to have."""
    return added(
        (named(tuple(beams), cells), chance * more)
        for beams, chance in draws(FIRST_P, width)
        for cells, more in draws(second_law(beams, FIRST_P, AFTER_P), width)
    )


@pytest.mark.parametrize(("width", "trials"), [(1, 1), (1, 2), (2, 2), (1, 3), (2, 3)])
def test_two_layers_have_the_law_of_beam_sampling(width: int, trials: int) -> None:
    """D3: with drafts of parents that were not kept; leaving them out as printed is wrong."""
    expected = beam_sampling(width)
    assert sum(expected.values()) == 1
    assert two_layers(width, trials, null_trials) == expected
    assert two_layers(width, trials, conditional) == expected
    wrong = two_layers(width, trials, filtered)
    assert (wrong != expected) == (trials > width), "no parent can have been left out"


def test_a_width_that_knows_the_candidates_is_wrong() -> None:
    """Widths follow from laws alone: one that looks at the drafts gives another law."""

    def outcomes() -> Iterator[tuple[Beams, Fraction]]:
        for cells, chance in draws(Q, 2):
            candidates = [Candidate(cell, Q[cell]) for cell in cells]
            width = 1 + (cells[0] == 2)
            for verdict, branch in branches(partial(accept_layer, P, Q, candidates, width)):
                kept = [cells[number] for number in verdict.kept]
                for beams, more in filled(kept, verdict.next, verdict.later, width, False):
                    yield beams, chance * branch * more

    law = added(outcomes())
    of_one = [sum((c for k, c in law.items() if k == (n,)), Fraction(0)) for n in range(3)]
    assert [chance / sum(of_one) for chance in of_one] != list(P)


def test_laws_may_be_tensors() -> None:
    """The same numbers as with fractions."""
    p, q = (torch.tensor([float(x) for x in law], dtype=torch.float64) for law in (P, Q))
    for cells in itertools.product(range(3), repeat=2):
        found = accept_layer(p, q, [Candidate(c, float(q[c])) for c in cells], 2, lambda _: False)
        exactly = accept_layer(P, Q, [Candidate(c, Q[c]) for c in cells], 2, lambda _: False)
        wanted = torch.tensor([float(x) for x in exactly.next], dtype=torch.float64)
        torch.testing.assert_close(found.next, wanted)


def test_little_mass_outside_of_drawn_cells_is_not_rounded_away() -> None:
    """Without replacement at a low temperature: 1 - q of the first cell has no digit left."""
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    q = torch.tensor([1, 3e-20, 1e-20], dtype=torch.float64)
    outside = rests(q, [0, 1, 2])
    assert outside[:2] == [pytest.approx(4e-20), pytest.approx(1e-20)]
    candidates = [Candidate(c, q[c], rest) for c, rest in zip([0, 1], outside, strict=False)]
    chances: list[float] = []

    def keep(chance: torch.Tensor) -> bool:
        chances.append(float(chance))
        return len(chances) == 1

    verdict = accept_layer(p, q, candidates, 2, keep, distinct=True)
    assert chances == pytest.approx([0.5, 0.5 / 0.75])
    assert verdict.next.tolist() == [0, 0, 1]
