"""Texts with a decoder of their own, beside the batch: each has its own keys and values.

They go on in turn, one of them by one forward between two forwards of the batch; so rows of the
batch get at least every second forward, whatever else is asked for.
"""

import collections
from collections.abc import Callable, Iterator
from typing import NamedTuple

from model.decoding.batch import Piece, Request

# Pieces of one text, a list for each of its forwards; the first reads the prompt.
Forwards = Iterator[list[Piece]]


class Alone(NamedTuple):
    """How a text is decoded outside of the batch.

    Attributes:
        decoder: its name.
        beams: how many it has at most.
        forwards: begins it, as a row of a number; nothing is computed before the first is asked
            for.
    """

    decoder: str
    beams: int
    forwards: Callable[[int, Request], Forwards]


class Lanes:
    """The texts that run; used by one thread.

    Args:
        beams: of all of them together, at most.
    """

    def __init__(self, beams: int) -> None:
        self.most_beams = self.free_beams = beams
        self._turns: collections.deque[int] = collections.deque()
        self._running: dict[int, tuple[Alone, Forwards]] = {}

    def __len__(self) -> int:
        return len(self._running)

    def begin(self, number: int, request: Request, alone: Alone) -> None:
        """Take a text; its turn is the last."""
        assert alone.beams <= self.free_beams, (alone.beams, self.free_beams)
        self.free_beams -= alone.beams
        self._running[number] = alone, alone.forwards(number, request)
        self._turns.append(number)

    def next(self) -> int:
        """The number of the text whose turn it is."""
        return self._turns[0]

    def step(self) -> list[Piece]:
        """One forward of this text; the next one has the turn then."""
        number = self._turns[0]
        self._turns.rotate(-1)
        return next(self._running[number][1])

    def leave(self, number: int) -> None:
        """Give up a text, or what is left of one that has ended."""
        alone, forwards = self._running.pop(number)
        self._turns.remove(number)
        self.free_beams += alone.beams
        del forwards  # and with it the keys and values
