"""Laws in fractions: all branches of a function that tosses coins, with their probabilities."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from fractions import Fraction
from typing import Any, TypeVar

import numpy

Array = Any  # of fractions

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


def exact(*tenths: int | Fraction) -> Array:
    """An array of fractions, of numbers of tenths."""
    return numpy.array([Fraction(number) / 10 for number in tenths], dtype=object)


def branches(run: Callable[[Callable[[Any], bool]], T]) -> Iterator[tuple[T, Fraction]]:
    """Every outcome of `run`, which tosses coins with what it is given, and its probability."""
    scripts: list[list[bool]] = [[]]
    while scripts:
        coin = _Coin(scripts.pop())
        yield run(coin), coin.weight
        scripts += coin.others


class _Coin:
    """Answers as its script says, then always true where that is possible.

    Args:
        script: the first answers.

    Attributes:
        weight: probability of the answers.
        others: scripts of the branches that were not taken.
    """

    def __init__(self, script: list[bool]) -> None:
        self.weight = Fraction(1)
        self.others: list[list[bool]] = []
        self._script = script
        self._asked: list[bool] = []

    def __call__(self, chance: Any) -> bool:
        """Toss it."""
        if len(self._asked) < len(self._script):
            answer = self._script[len(self._asked)]
        else:
            answer = chance > 0
            if 0 < chance < 1:
                self.others.append([*self._asked, False])
        self._asked.append(answer)
        self.weight *= Fraction(chance) if answer else 1 - Fraction(chance)
        return answer


def draws(
    law: Array, count: int, *, distinct: bool = False
) -> Iterator[tuple[list[int], Fraction]]:
    """All ordered draws of cells from a law, with their probabilities."""
    for cells in itertools.product(range(len(law)), repeat=count):
        chance, left = Fraction(1), Fraction(1)
        for number, cell in enumerate(cells):
            if distinct and cell in cells[:number]:
                chance = Fraction(0)
            chance *= law[cell] / left if left else 0
            left -= law[cell] if distinct else 0
        if chance:
            yield list(cells), chance


def added(pairs: Iterator[tuple[K, Fraction]]) -> dict[K, Fraction]:
    """The law of what comes with probabilities."""
    law: dict[K, Fraction] = defaultdict(Fraction)
    for key, chance in pairs:
        if chance:
            law[key] += chance
    return dict(law)


def product_law(
    law: Array, count: int, *, distinct: bool = False
) -> dict[tuple[int, ...], Fraction]:
    """Of ordered draws."""
    return added((tuple(cells), c) for cells, c in draws(law, count, distinct=distinct))


def marginal(law: dict[tuple[int, ...], Fraction], cells: int) -> Sequence[Fraction]:
    """Of the first draw."""
    return [sum((c for key, c in law.items() if key[0] == n), Fraction(0)) for n in range(cells)]
