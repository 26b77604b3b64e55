"""A phase of a build: numbered items that any number of workers do in any order."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

# To start a process takes 1.2 s of one core, in which one that runs encodes 80 MB, or 5 MB with the
# slow library (benchmarks/data_prep.py: 41 MB in 2.8 s by one process and 4.8 s by two, 160 MB in
# 6.6 s and 12.7 s on two busy cores); and the first process of several only waits.
FAST_BYTES_PER_WORKER = 1 << 27
SLOW_BYTES_PER_WORKER = 1 << 23


class Done(NamedTuple):
    """What one finished item adds to the progress."""

    tokens: int = 0
    rejects: int = 0


class Observer(Protocol):
    """Watches a build; the command line shows a progress line with it."""

    def say(self, message: str) -> None:
        """Show a message about a step of the build."""

    def start(self, verb: str, total_bytes: int, units: int) -> None:
        """A phase starts; `total_bytes` of input are still to be read."""

    def finish(self, input_bytes: int, tokens: int, rejects: int) -> None:
        """More of the phase is on disk."""

    def reading(self, text_bytes: int) -> None:
        """Text that was read in this phase so far, that of unfinished units included."""

    def skip(self, input_bytes: int) -> None:
        """That much is on disk, done by others."""


@dataclass(frozen=True)
class Phase:
    """Items 0 .. len(sizes) - 1; each is done when its result is on disk.

    Doing an item twice, even at the same time in two processes, gives the same bytes under the
    same names. So which worker does what affects only the time it takes.

    Attributes:
        name: Names the phase in claims; letters only.
        verb: Its name in messages, for example "encoding".
        work: Does one item; can be sent to another process.
        is_finished: Whether the result of an item is on disk.
        sizes: Input bytes of each item, `[items]`.
        bytes_per_worker: Input for which another process takes longer to start than it saves.
    """

    name: str
    verb: str
    work: Callable[[int], Done]
    is_finished: Callable[[int], bool]
    sizes: NDArray[np.int64]
    bytes_per_worker: int = FAST_BYTES_PER_WORKER


class Workers(Protocol):
    """The processes that work on a job.

    Attributes:
        shares_output: True when other workers may write to the same output at the same time.
    """

    shares_output: bool

    def run(self, phase: Phase, observer: Observer) -> None:
        """Return when every item of the phase is on disk.

        Raises:
            DataError: An item cannot be done.
        """

    def claim(self, name: str) -> AbstractContextManager[None]:
        """Claim a step that only one should do; other workers of this output wait."""

    def close(self) -> None:
        """Release everything: the build is over, with or without success."""


def announce(phase: Phase, missing: NDArray[np.int64], observer: Observer) -> None:
    """Report how much of a phase is left."""
    total = len(phase.sizes)
    if 0 < len(missing) < total:
        observer.say(f"{total - len(missing):,} of {total:,} units are already on disk")
    if len(missing):
        observer.start(phase.verb, int(phase.sizes[missing].sum()), len(missing))


def missing_items(phase: Phase) -> NDArray[np.int64]:
    """The items that are not on disk, in order."""
    numbers = range(len(phase.sizes))
    return np.array([item for item in numbers if not phase.is_finished(item)], dtype=np.int64)
