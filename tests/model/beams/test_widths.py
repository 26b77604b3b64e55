"""How many of a layer's candidates are kept, against all branches in fractions."""

from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from typing import Any

import pytest

from model.beams.acceptance import Candidate, accept_layer
from model.beams.widths import kept_counts, reached_width, trial_chances
from tests.support.exact_laws import Array, added, branches, draws, exact

P, Q = exact(5, 3, 2), exact(2, 2, 6)


def enumerated(p: Array, q: Array, trials: int) -> list[Fraction]:
    """Probabilities that 0 .. m candidates are kept, where all may be."""

    def outcomes() -> Iterator[tuple[int, Fraction]]:
        for cells, chance in draws(q, trials):
            candidates = [Candidate(cell, q[cell]) for cell in cells]
            for verdict, branch in branches(partial(accept_layer, p, q, candidates, trials)):
                yield len(verdict.kept), chance * branch

    law = added(outcomes())
    return [law.get(count, Fraction(0)) for count in range(trials + 1)]


@pytest.mark.parametrize("trials", [1, 2, 3, 4])
def test_the_recurrence_is_the_enumeration(trials: int) -> None:
    """D2: equal to all branches, sums to 1, and its ends are products."""
    for p, q in ((P, Q), (Q, P), (exact(6, 4, 0), exact(0, 1, 9))):
        chances = trial_chances(p, q, trials)
        counts = kept_counts(chances)
        assert counts == enumerated(p, q, trials)
        assert sum(counts) == 1
        assert counts[-1] == chances[0] ** trials
        none: Any = 1
        for chance in chances:
            none *= 1 - chance
        assert counts[0] == none


def test_chances_are_those_of_the_formula() -> None:
    """The erratum of the code: taking q away twice makes all but the first too small."""
    chances = trial_chances(P, Q, 3)
    assert [round(float(chance), 3) for chance in chances] == [0.6, 0.4, 0.283]
    twice = [chances[0], chances[2], trial_chances(P, Q, 5)[4]]
    assert kept_counts(twice) != enumerated(P, Q, 3)


def test_a_trial_may_fail_for_certain() -> None:
    """Where q has less than 1 on these cells, the rest is trials that fail."""
    part = exact(2, 2, 0)
    chances = trial_chances(P, part, 2)
    assert chances[0] == Fraction(4, 10)
    assert sum(kept_counts(chances)) == 1


def test_equal_laws_reach_every_width() -> None:
    """D4: all are kept, whatever is asked for."""
    counts = kept_counts(trial_chances(P, P, 5))
    assert counts == [0, 0, 0, 0, 0, 1]
    assert [reached_width(counts, t) for t in (0.0, 0.5, 1.0)] == [5, 5, 5]


def test_the_width_falls_with_the_threshold() -> None:
    """D8: it never grows, from all candidates to none."""
    counts = kept_counts(trial_chances(P, Q, 4))
    widths = [reached_width(counts, step / 20) for step in range(21)]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] == 4
    assert widths[-1] == 0
    assert len(set(widths)) > 2
    for step, width in enumerate(widths):
        assert sum(counts[width:]) >= Fraction(step, 20)
        assert width == 4 or sum(counts[width + 1 :]) < Fraction(step, 20)
