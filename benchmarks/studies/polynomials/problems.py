"""Problems: an expression of m operations, an equals sign, and the five digits of its value.

Every operator and every coefficient is as likely as any other. Of a binary operator's remaining
m - 1 operations the left side gets 0 to m - 1, each number as likely; the paper does not say.
"""

import random
from typing import NamedTuple

from benchmarks.studies.polynomials.ring import (
    MODULUS,
    SIZE,
    Element,
    add,
    compose,
    multiply,
    negate,
    spelled,
)

PAUSE = "_"
_BINARY = {"+": add, "*": multiply, "@": compose}


class Problem(NamedTuple):
    """A question and its answer.

    Attributes:
        question: up to and with the equals sign.
        answer: five digits.
    """

    question: str
    answer: str


def make_problem(generator: random.Random, operations: int, pauses: int = 0) -> Problem:
    """A problem of `operations` operations, with pause tokens before the equals sign."""
    text, value = _expression(generator, operations)
    return Problem(text + PAUSE * pauses + "=", spelled(value))


def _expression(generator: random.Random, operations: int) -> tuple[str, Element]:
    if operations == 0:
        value = tuple(generator.randrange(MODULUS) for _ in range(SIZE))
        return spelled(value), value
    operator = generator.choice(["-", *_BINARY])
    if operator == "-":
        text, value = _expression(generator, operations - 1)
        return f"(-{text})", negate(value)
    left = generator.randint(0, operations - 1)
    (text_f, f), (text_g, g) = (
        _expression(generator, left),
        _expression(generator, operations - 1 - left),
    )
    return f"({text_f}{operator}{text_g})", _BINARY[operator](f, g)
