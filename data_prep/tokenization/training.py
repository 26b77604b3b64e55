"""Training a tokenizer on texts of any kind, with signs of life, and ended by Ctrl-C.

The library learns within words. It moves all letters behind a place that it joins, so a megabyte
without a border, such as a genome or a line of signs, would take it hours; and it runs outside of
Python, where signals wait until it is done.
"""

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from data_prep.tokenization.tokenizer import train_tokenizer

LONGEST_RUN = 1024
SECONDS_BETWEEN_LINES = 10.0
_POLL_S = 0.1

# The places where a run of one kind begins, then more of it than is trained on as one word.
_LONG_BLANK = re.compile(rf"\s(?<!\s\s)\s{{{LONGEST_RUN},}}")
_LONG_WORD = re.compile(
    rf"(?<![^\W\d_])[^\W\d_]{{{LONGEST_RUN + 1},}}"
    rf"|(?<![^\w\s])(?<!_)(?:[^\w\s]|_){{{LONGEST_RUN + 1},}}"
)


def train_watched(
    texts: Iterable[str],
    vocab_size: int,
    say: Callable[[str], None],
    *,
    line_s: float | None = None,
) -> bytes:
    """`train_tokenizer` that says now and then how far it is, and that Ctrl-C ends at once.

    Args:
        texts: Training documents.
        vocab_size: Size with the end-of-text token.
        say: Shows a line.
        line_s: Seconds between lines; None = SECONDS_BETWEEN_LINES.

    Returns:
        The bytes of the tokenizer.json: those of `train_tokenizer` for texts without runs of more
        than LONGEST_RUN letters, signs or blanks.

    Raises:
        DataError: As `train_tokenizer`, or of the texts.
        KeyboardInterrupt: The thread that trains is left behind, and ends with the process.
    """
    trained: list[bytes] = []
    failed: list[BaseException] = []
    read = 0
    is_reading = True

    def pieces() -> Iterator[str]:
        nonlocal read, is_reading
        for text in texts:
            yield from cut_runs(text)
            read += len(text)
        is_reading = False

    def work() -> None:
        try:
            trained.append(train_tokenizer(pieces(), vocab_size))
        except BaseException as error:  # raised again below
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    started_s = said_s = time.monotonic()
    while thread.is_alive():
        thread.join(_POLL_S)
        now_s = time.monotonic()
        if now_s - said_s >= (SECONDS_BETWEEN_LINES if line_s is None else line_s):
            said_s = now_s
            step = "reading the sample" if is_reading else "learning tokens"
            say(f"{step}: {read / 1e6:,.1f} million characters, {now_s - started_s:.0f} s")
    if failed:
        raise failed[0]
    return trained[0]


def cut_runs(text: str) -> Iterator[str]:
    """A text in parts that have no run of one kind above LONGEST_RUN; most are given whole.

    Example: with a limit of 2, "ab abcde" gives "ab ab", "cd", "e".
    """
    if max(map(len, text.split()), default=0) <= LONGEST_RUN and not _LONG_BLANK.search(text):
        yield text
        return
    start = 0
    runs = [*_LONG_WORD.finditer(text), *_LONG_BLANK.finditer(text)]
    for run in sorted(runs, key=re.Match.start):
        for cut in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN):
            yield text[start:cut]
            start = cut
    yield text[start:]
