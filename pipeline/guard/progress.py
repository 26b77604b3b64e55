"""What a rank's main thread is doing, and how long that may take, by what it took before."""

import time
from collections import deque
from collections.abc import Callable
from typing import Literal, NamedTuple, Self

from pipeline.config.sections import TrainSection

Phase = Literal["start", "step", "evaluation", "save"]
_FACTOR = 10
_REMEMBERED = 100
# The start and the first of a kind have no bound to learn from, and a model may be read for long.
_UNKNOWN_TIMEOUTS = 6


class Doing(NamedTuple):
    """A phase that is going on.

    Attributes:
        phase: what kind.
        number: of phases before it, of all kinds; the same on ranks that do the same.
        since_s: when it began, by the clock.
    """

    phase: Phase
    number: int
    since_s: float


class Progress:
    """Told by the main thread, read by the thread that watches it.

    Args:
        least_s: no phase counts as hung before.
        unknown_s: the bound of a phase of which none has ended yet.
        clock: monotonic seconds.
    """

    def __init__(
        self, *, least_s: float, unknown_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._least_s = least_s
        self._unknown_s = unknown_s
        self._clock = clock
        self._took: dict[Phase, deque[float]] = {}
        self.doing: Doing | None = Doing("start", 0, clock())

    @classmethod
    def of_run(cls, options: TrainSection) -> Self:
        """With the limits of a run."""
        unknown_s = _UNKNOWN_TIMEOUTS * options.timeout_s
        return cls(least_s=options.stall_timeout_s, unknown_s=unknown_s)

    def enter(self, phase: Phase) -> None:
        """The phase before has ended, another one begins."""
        now, before = self._clock(), self.doing
        # Of a save the main thread sees a part only, mostly the beginning: `took` tells the rest.
        if before is not None and before.phase != "save":
            self.took(before.phase, now - before.since_s)
        number = 0 if before is None else before.number + 1
        self.doing = Doing(phase, number, now)

    def took(self, phase: Phase, seconds: float) -> None:
        """A phase of this kind, whoever did it, lasted so long."""
        self._took.setdefault(phase, deque(maxlen=_REMEMBERED)).append(seconds)

    def leave(self) -> None:
        """Nothing more is to be watched."""
        self.doing = None

    def bound_s(self, phase: Phase) -> float:
        """Ten times the longest of the last phases of this kind, within the limits."""
        took = tuple(self._took.get(phase, ()))
        return max(self._least_s, _FACTOR * max(took)) if took else self._unknown_s

    def learned(self, phase: Phase) -> int:
        """From how many phases the bound comes."""
        return len(self._took.get(phase, ()))
