"""How wide a layer is: the most beams that its candidates give with enough probability.

Legend: p the law that beams are to have, q the law that candidates were drawn from, m candidates.
"""

from collections.abc import Sequence
from typing import Any

from model.beams.acceptance import Law


def trial_chances(target: Law, draft: Law, trials: int) -> list[Any]:
    """The probability that a candidate is kept, once all since the last kept one were not.

    Args:
        target: p.
        draft: q, of the same cells.
        trials: m.

    Returns:
        For 0 .. m - 1 candidates that were not kept: the sum of the smaller of p' and q.
    """
    # After any number of them p' is the positive part of p - taken x q, over its sum.
    chances: list[Any] = []
    taken, left = 0, target.sum()
    while len(chances) < trials:
        taken = taken + left
        still = (target - taken * draft).clip(min=0).sum()
        chances.append(1 - still / left)
        if not still > 0:  # p' = q: the next one is kept for certain, too
            chances += [chances[-1]] * (trials - len(chances))
        left = still
    return chances


def kept_counts(chances: Sequence[Any]) -> list[Any]:
    """Probabilities that 0 .. m of m candidates are kept (Qin et al. 2024, section 3.2).

    The first that is kept is the i-th with chances[i - 1] x the others' failing; from there on it
    is the same with m - i candidates and one fewer to keep.
    """
    trials = len(chances)
    none: list[Any] = [1]
    for chance in chances:
        none.append(none[-1] * (1 - chance))
    first = [none[i] * chances[i] for i in range(trials)]
    counts: list[list[Any]] = [[none[m]] for m in range(trials + 1)]
    for m in range(1, trials + 1):
        for k in range(1, m + 1):
            counts[m].append(sum(first[i] * counts[m - i - 1][k - 1] for i in range(m - k + 1)))
    return counts[trials]


def reached_width(counts: Sequence[Any], threshold: float) -> int:
    """The most beams that are kept with at least this probability.

    Args:
        counts: probabilities that 0 .. m candidates are kept.
        threshold: t.
    """
    width, at_least = 0, 1
    for beams in range(1, len(counts)):
        at_least = at_least - counts[beams - 1]
        if at_least < threshold:
            break
        width = beams
    return width
