"""Text of any origin as a part of a message: one line, short, without what a terminal acts on."""

import os

LONGEST = 200  # letters


def printable(text: str, longest: int = LONGEST) -> str:
    """The beginning of a text, with escapes for control characters and halves of characters."""
    cut = text if len(text) <= longest else text[: longest - 3] + "..."
    return cut if cut.isprintable() else "".join(map(_shown, cut))


def reason(error: Exception) -> str:
    """What is wrong with a file whose path is named beside it."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return printable(" ".join(text.split()))


def told(error: OSError) -> str:
    """An error of the system with the path that it is about."""
    path = "" if error.filename is None else os.fsdecode(error.filename)
    return f"{printable(path)}: {reason(error)}" if path else reason(error)


def _shown(letter: str) -> str:
    return letter if letter.isprintable() else ascii(letter)[1:-1]
