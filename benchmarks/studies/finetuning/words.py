"""Words of letters, what can be done with them, and the words that no model sees in training.

A text shows one thing done to a word after another, as `u cafbeh CAFBEH`. A question asks for two
things at once, which no text shows: `un cafbeh ` is the next letters (`n`), as capitals (`u`).
"""

import random
from collections.abc import Callable
from typing import NamedTuple

LENGTH = 6
LETTERS = "abcdefgh"
_LINES = 8


def _next_letters(word: str) -> str:
    """Each letter's successor; after the last comes the first."""
    return "".join(LETTERS[(LETTERS.index(letter) + 1) % len(LETTERS)] for letter in word)


def _swapped(word: str) -> str:
    """Each two neighbours in the other order."""
    return "".join(word[place + 1] + word[place] for place in range(0, LENGTH, 2))


def _turned(word: str) -> str:
    """The first letter goes to the end."""
    return word[1:] + word[0]


OPERATIONS: dict[str, Callable[[str], str]] = {
    "c": str,  # a copy
    "u": str.upper,
    "n": _next_letters,
    "s": _swapped,
    "t": _turned,
}
PAIRS = ("un", "us", "ut", "sn", "tn")


class Question(NamedTuple):
    """A prompt and its completion.

    Attributes:
        prompt: what to do, the last thing first, and the word; ends in a blank.
        answer: what comes of it.
    """

    prompt: str
    answer: str


def held_out(word: str) -> bool:
    """Whether a word is asked for at the end, and never shown before: one of eight is."""
    return sum(map(LETTERS.index, word)) % len(LETTERS) == 0


def make_text(generator: random.Random) -> str:
    """Lines, each of them an operation, a word, and what comes of it."""
    lines = []
    for _ in range(_LINES):
        sign, word = generator.choice(list(OPERATIONS)), _word(generator, asked=False)
        lines.append(f"{sign} {word} {OPERATIONS[sign](word)}\n")
    return "".join(lines)


def make_question(generator: random.Random, *, asked: bool) -> Question:
    """A question on a word that is held out, or on one of the others."""
    signs, word = generator.choice(PAIRS), _word(generator, asked=asked)
    outer, inner = OPERATIONS[signs[0]], OPERATIONS[signs[1]]
    return Question(f"{signs} {word} ", outer(inner(word)))


def _word(generator: random.Random, *, asked: bool) -> str:
    while True:
        word = "".join(generator.choices(LETTERS, k=LENGTH))
        if held_out(word) is asked:
            return word
