"""How much text the processes of this machine have read in a phase: a sign of life within units.

Whoever works on a unit adds what it read. The counter is in shared memory, so that the process
that shows the progress sees what its workers do between two finished units.
"""

import multiprocessing
from multiprocessing.sharedctypes import Synchronized

_counter: "Synchronized[int] | None" = None


def new_counter() -> "Synchronized[int] | None":
    """A counter at zero, to be passed to the processes that work; None without shared memory."""
    try:
        counter: Synchronized[int] = multiprocessing.get_context("spawn").Value("q", 0)
    except OSError:
        return None
    return counter


def count_with(counter: "Synchronized[int] | None") -> None:
    """From now on this process adds to this counter; None = it counts nothing."""
    global _counter
    _counter = counter


def add(text_bytes: int) -> None:
    """So much more text was read."""
    if _counter is not None:
        with _counter.get_lock():
            _counter.value += text_bytes
