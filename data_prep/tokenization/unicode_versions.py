"""Characters on which two libraries with different Unicode tables may disagree.

Split patterns ask whether a character is a letter, a number, a blank or a sign. Of all characters
up to U+3FFFF, gigatoken 0.10 and tokenizers 0.23 answer differently for 4,657: the letters and
numbers that Unicode 17.0 added, which one of them takes for punctuation. Documents that hold any
of them are rare; they are encoded by the library that defines the ids.
"""

import re
from collections.abc import Iterable
from functools import lru_cache

DISPUTED = (
    (0x88F, 0x88F), (0xC5C, 0xC5C), (0xCDC, 0xCDC), (0xA7CE, 0xA7CF), (0xA7D2, 0xA7D2),
    (0xA7D4, 0xA7D4), (0xA7F1, 0xA7F1), (0x10940, 0x10959), (0x10EC5, 0x10EC7),
    (0x11DB0, 0x11DDB), (0x11DE0, 0x11DE9), (0x16EA0, 0x16EB8), (0x16EBB, 0x16ED3),
    (0x16FF2, 0x16FF6), (0x187F8, 0x187FF), (0x18D09, 0x18D1E), (0x18D80, 0x18DF2),
    (0x1E6C0, 0x1E6DE), (0x1E6E0, 0x1E6E2), (0x1E6E4, 0x1E6E5), (0x1E6E7, 0x1E6ED),
    (0x1E6F0, 0x1E6F4), (0x1E6FE, 0x1E6FF), (0x2B73A, 0x2B73F), (0x2CEA2, 0x2CEAD),
    (0x323B0, 0x33479),
)  # fmt: skip


def is_disputed(text: bytes) -> bool:
    """True when a text in UTF-8 holds a character that libraries may take differently."""
    # Most texts have none of the bytes that these characters begin with; looking costs nothing.
    if b"\xe0" not in text and b"\xea" not in text and b"\xf0" not in text:
        return False
    return _disputed().search(text) is not None


def disputed_characters() -> list[str]:
    """All of them."""
    return [chr(number) for first, last in DISPUTED for number in range(first, last + 1)]


@lru_cache(maxsize=1)
def _disputed() -> re.Pattern[bytes]:
    return re.compile(_match_any(character.encode() for character in disputed_characters()))


def _match_any(words: Iterable[bytes]) -> bytes:
    """A pattern for any of some byte strings of which none begins another, branched by byte.

    Example: ab, ac and b give (?:a(?:b|c)|b), with every byte escaped.
    """
    rests: dict[int, list[bytes]] = {}
    for word in words:
        rests.setdefault(word[0], []).append(word[1:])
    branches = [
        re.escape(bytes([first])) + (_match_any(rest) if rest != [b""] else b"")
        for first, rest in rests.items()
    ]
    return b"(?:" + b"|".join(branches) + b")"
