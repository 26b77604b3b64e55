"""Entropies of random tables, and how often a loss counts a choice (Gloeckle et al. 2024).

Section 5 and appendix L. Tables are rational; entropies are compared in floating point.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import log
from random import Random

Table = tuple[tuple[Fraction, ...], ...]  # p(x, y), rows by x


def random_table(generator: Random, rows: int, columns: int) -> Table:
    """A joint distribution with positive rational entries."""
    weights = [[generator.randint(1, 50) for _ in range(columns)] for _ in range(rows)]
    total = sum(map(sum, weights))
    return tuple(tuple(Fraction(weight, total) for weight in row) for row in weights)


def first(p: Table) -> list[Fraction]:
    """p(x)."""
    return [sum(row, Fraction()) for row in p]


def second(p: Table) -> list[Fraction]:
    """p(y)."""
    return [sum(column, Fraction()) for column in zip(*p, strict=True)]


def entropy(distribution: Sequence[Fraction]) -> float:
    """H, in nats."""
    return -sum(float(p) * log(p) for p in distribution if p)


def cross_entropy(p: Sequence[Fraction], q: Sequence[Fraction]) -> float:
    """H(p, q), in nats."""
    return -sum(float(a) * log(b) for a, b in zip(p, q, strict=True) if a)


def conditional_entropy(p: Table, q: Table) -> float:
    """H(p_{Y|X}, q_{Y|X}): of the second given the first, over the first's distribution."""
    q_first = first(q)
    return -sum(
        float(a) * log(b / q_first[x])
        for x, (row, other) in enumerate(zip(p, q, strict=True))
        for a, b in zip(row, other, strict=True)
        if a
    )


def divergence(p: Sequence[Fraction], q: Sequence[Fraction]) -> float:
    """D(p || q)."""
    return cross_entropy(p, q) - entropy(p)


def relative_mutual_information(p: Table, q: Table) -> float:
    """I_{p||q}(X; Y) = D(p || q_X x q_Y) - D(p || q); with q = p the mutual information."""
    flat_p = [a for row in p for a in row]
    flat_q = [a for row in q for a in row]
    product = [a * b for a in first(q) for b in second(q)]
    return divergence(flat_p, product) - divergence(flat_p, flat_q)


def transposed(p: Table) -> Table:
    """p(y, x)."""
    return tuple(zip(*p, strict=True))


def identity_gap(p: Table) -> float:
    """H(X) + H(Y) - (H(X|Y) + 2 I(X;Y) + H(Y|X)), which is 0."""
    information = relative_mutual_information(p, p)
    given = conditional_entropy(transposed(p), transposed(p)) + conditional_entropy(p, p)
    return entropy(first(p)) + entropy(second(p)) - (given + 2 * information)


def relative_gap(p: Table, q: Table) -> float:
    """H(p_X, q_X) - (H(p_{X|Y}, q_{X|Y}) + I_{p||q}(X;Y)), which is 0."""
    given = conditional_entropy(transposed(p), transposed(q))
    wanted = given + relative_mutual_information(p, q)
    return cross_entropy(first(p), first(q)) - wanted


def terms_at(choice: int, length: int, heads: int) -> int:
    """Terms of an n-token loss over a text that touch what is decided at a place.

    In the toy model of appendix L a text is fixed but for choices: after a choice point the tokens
    follow from it. A term (t, k), the prediction of token t+k from those up to t, is touched by the
    choice when t lies before it and t+k at or after it.
    """
    return sum(1 for t in range(-heads, length) for k in range(1, heads + 1) if t < choice <= t + k)


def inconsequential_terms(heads: int) -> int:
    """Terms that predict one token which decides nothing: one for each head."""
    return heads
