"""Which draft beams of a layer are kept: pure functions of laws, candidates and chance.

A law is a vector of probabilities of cells, a cell being a beam and a token that may follow it. The
functions take tensors, and arrays of exact numbers just as well: tests enumerate them in fractions.

Legend: p the law that beams are to have (p_beam), q the law that candidates were drawn from.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Law = Any  # a Tensor, or an array of exact numbers


class Candidate(NamedTuple):
    """A draft beam.

    Attributes:
        cell: its number; None = its parent was not kept, so it has none.
        mass: of q on it, its parent kept or not.
        rest: of q outside of it and of those before it, where draws are without replacement. None =
            what 1 leaves without their masses, of which rounding may leave nothing that is right.
    """

    cell: int | None
    mass: Any
    rest: Any = None


class LayerVerdict(NamedTuple):
    """What became of a layer's candidates.

    Attributes:
        kept: numbers of those that are kept.
        tried: how many were looked at.
        next: law of the next beam, where fewer are kept than the layer is wide.
        later: law of those after it.
    """

    kept: list[int]
    tried: int
    next: Law
    later: Law


def residual(p: Law, q: Law) -> Law:
    """What is left of p when a candidate of q was not kept: the positive part, normalized.

    Nothing is left where p = q up to rounding; then candidates are kept, and p itself is as good.
    """
    excess = (p - q).clip(min=0)
    total = excess.sum()
    return excess / total if total > 0 else p


def keeping_chance(p: Law, q: Law, cell: int) -> Any:
    """The probability of keeping a candidate."""
    if not q[cell] > 0:
        return 0
    return min(p[cell] / q[cell], 1)


def without(law: Law, cell: int) -> Law:
    """A law without one of its cells, normalized; all zero where it had no other."""
    left = copy.deepcopy(law)
    left[cell] = 0
    total = left.sum()
    return left / total if total > 0 else left


def rests(law: Law, cells: Sequence[int]) -> list[Any]:
    """What a law has outside of the first cell, of the first two, ..: sums, not differences."""
    left, found = copy.deepcopy(law), []
    for cell in cells:
        left[cell] = 0
        found.append(left.sum())
    return found


def accept_layer(
    target: Law,
    draft: Law,
    candidates: Sequence[Candidate],
    width: int,
    keep: Callable[[Any], bool],
    *,
    distinct: bool = False,
) -> LayerVerdict:
    """Distribution-exact: kept beams, and those drawn from the verdict, are draws from the target.

    Recursive rejection: the first candidate is kept with probability min(1, p / q); when it is
    not, p' = the normalized positive part of p - q takes the place of p for the next one; when it
    is, p does again (Qin et al. 2024, Algorithm 1, whose printed ratio is upside down). A candidate
    whose parent was not kept is a trial that certainly fails, with the q of the others as it is:
    to leave it out would be wrong, since it would leave out a draw that had to be made.

    Args:
        target: p of all cells of the beams that were kept in the layer before.
        draft: q of the same cells; it sums to less than 1 where other parents had mass.
        candidates: in the order of their draws, independent or, if distinct, without replacement.
        width: how many beams the layer gets; must not depend on the candidates.
        keep: tosses a coin of the given probability of keeping.
        distinct: beams are to be without replacement, too.
    """
    wanted = left = target
    q, rest, tried = draft, 1, 0
    kept: list[int] = []
    for number, (cell, mass, outside) in enumerate(candidates):
        if len(kept) == width:
            break
        tried += 1
        if cell is not None and keep(keeping_chance(left, q, cell)):
            kept.append(number)
            wanted = without(wanted, cell) if distinct else wanted
            left = wanted
        else:
            left = residual(left, q)
        if distinct:
            rest = rest - mass if outside is None else outside
            if cell is not None:
                draft = copy.deepcopy(draft)
                draft[cell] = 0
            q = draft / rest if rest > 0 else draft
    return LayerVerdict(kept, tried, left, wanted)
