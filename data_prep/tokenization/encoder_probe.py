"""Texts on which two encoders of one tokenizer would show their differences."""

import random
import unicodedata
from collections.abc import Sequence

SEED = 20_240_501
NUM_RANDOM = 150
LONG_CHARACTERS = 4000
MOST_NAMES = 2000
MARKED_CHARACTERS = range(0xC0, 0x1F000)
HANGUL = "가", "힣"  # composed by rule; some are among the other texts

_WORDS = """
a A the The _x __init__ def return self. x=1 (a,b) {} [] // /* */ # ## -> => != == <= 0 7 12 123
1234 3.14 1e-9 0x1F 'll 'S 're ' " ` ~ @ $ % ^ & * naïve été ÇA K ß Straße жизнь 数据 の 한국 é 🎉
🇩🇪 ½ ² Ⅷ \u017f \u0130 \u0131 \u03a9 \u05d0 \u0627 \u0e01 \u094d \u0663 \u09ea \ua66f e\u0301 \u200d
\u200b \ufeff \u00ad 👩\u200d💻 \U00016ec0 \U0002b73a \ue000 \U0010ffff \x00 \x07 \x7f
"""
_BLANKS = (
    *(" ", "  ", "    ", "\t", "\n", "\n\n", "\r\n", "\r", " \n", "\n ", "\u00a0", "\u2003"),
    *("\u2028", "\x0b", "\x0c", "\x85", "\u3000", " " * 17, "\n" * 9),
)
_SOURCE = '''def f(x: int) -> dict[str, int]:
    """Don't split WE'LL or we'll; 12345 numbers."""
    return {f"{x}": 0x1F, 'k': 1_000_000}  # end\r\n\tif (a && !b) { c += d->e; } /* é */
'''


def probe_texts(added_names: Sequence[str]) -> list[str]:
    """Words, blanks, code, random Unicode, long runs and texts of added tokens; repeatable.

    Args:
        added_names: The texts of the tokens that stand beside the vocabulary.
    """
    added_names = list(dict.fromkeys(added_names))[:MOST_NAMES]
    rng = random.Random(SEED)
    names = [*added_names, *(name[:-1] for name in added_names)]
    words = _WORDS.split()
    pieces = [*words, *_BLANKS, *_BLANKS, *names]
    texts = [_SOURCE, *words, *_BLANKS, *names]
    texts += [f"a{name}{name} b\n{name}" for name in added_names]
    for _ in range(NUM_RANDOM):
        texts.append("".join(rng.choices(pieces, k=rng.randint(2, 40))))
        texts.append("".join(_random_character(rng) for _ in range(rng.randint(1, 60))))
    long = LONG_CHARACTERS
    texts += [
        sign * long for sign in ("a", " ", "\n", "7", "=", "é", "数", "🎉", "\r\n", " a", "\x00")
    ]
    texts.append("".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdef0123456789+/", k=long)))
    texts.append("".join(_random_character(rng) for _ in range(long)))
    return texts


def mark_texts() -> list[str]:
    """Every mark that has an order among marks, and everything that marks and letters compose to.

    Each mark stands among marks of two other classes, in both orders; each composed character is
    written whole and in parts.
    """
    texts = []
    for number in MARKED_CHARACTERS:
        character = chr(number)
        parts = unicodedata.normalize("NFD", character)
        if unicodedata.combining(character):
            texts.append(f"a\u0301{character}\u0323 e\u0323{character}\u0301")
        elif parts != character and not HANGUL[0] <= character <= HANGUL[1]:
            texts.append(f"{character} {parts} {parts}\u0323")
    return texts


def _random_character(rng: random.Random) -> str:
    """Any character that can be encoded, the low ones more often."""
    number = rng.randrange(rng.choice((0x80, 0x250, 0x3000, 0x10000, 0x110000)))
    return chr(number) if not 0xD800 <= number < 0xE000 else "\ufffd"
