"""Short stories by templates, and names that are exactly two tokens of a tokenizer.

Words of the stories are few and their order is random, so that a small model learns the language,
and what is left to learn is to look a name up that it has seen before.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import tokenizers

USUAL_NAMES = ("Tom", "Lily", "Max", "Anna", "Ben", "Sue", "Tim", "Mia")
_PLACES = ("park", "house", "garden", "school", "forest", "shop", "river", "farm")
_THINGS = ("ball", "book", "cake", "kite", "boat", "hat", "flower", "box")
_FEELINGS = ("happy", "sad", "tired", "hungry", "brave", "kind")
_OPENINGS = (
    "One day {a} went to the {place} with {b}.",
    "Once upon a time {a} and {b} lived near the {place}.",
    "In the morning {a} met {b} at the {place}.",
)
_SENTENCES = (
    "{a} saw a big {thing} and gave it to {b}.",
    "Then {b} was {feeling}, and {a} was {feeling2}.",
    '"Look at the {thing}!" said {a}.',
    "{b} took the {thing} to the {place}.",
    "{a} asked {b} to play with the {thing}.",
    "They looked for {b} in the {place}, but {a} found only a {thing}.",
    "Everybody liked {a} very much.",
)


class Story(NamedTuple):
    """A story and who is in it.

    Attributes:
        text: of the story.
        names: of its two characters.
    """

    text: str
    names: tuple[str, str]


def tell(generator: random.Random, names: Sequence[str]) -> Story:
    """A story of about 80 words about two of the names."""
    first, second = generator.sample(list(names), 2)
    lines = [generator.choice(_OPENINGS)]
    lines += [generator.choice(_SENTENCES) for _ in range(generator.randint(5, 8))]
    told = []
    for line in lines:
        a, b = (first, second) if generator.random() < 0.5 else (second, first)
        feelings = generator.sample(_FEELINGS, 2)
        told.append(
            line.format(
                a=a,
                b=b,
                place=generator.choice(_PLACES),
                thing=generator.choice(_THINGS),
                feeling=feelings[0],
                feeling2=feelings[1],
            )
        )
    return Story(" ".join(told), (first, second))


def two_token_names(tokenizer: tokenizers.Tokenizer, count: int, seed: int) -> list[str]:
    """Names that the tokenizer writes, after a space, as exactly two tokens; no usual ones.

    The first token is a space and a capital with letters, the second is letters.
    """
    pieces = {token: tokenizer.decode([number]) for token, number in tokenizer.get_vocab().items()}
    first = sorted(
        p for p in pieces.values() if p[:1] == " " and p[1:].isalpha() and p[1:2].isupper()
    )
    second = sorted(p for p in pieces.values() if p.isalpha() and p.islower() and p.isascii())
    if not (first and second):
        return []
    generator, found = random.Random(seed), set[str]()
    for _ in range(1_000 * count):
        if len(found) == count:
            break
        name = generator.choice(first) + generator.choice(second)
        if name[1:].istitle() and len(tokenizer.encode(name).ids) == 2:
            found.add(name[1:])
    return sorted(found - set(USUAL_NAMES))
