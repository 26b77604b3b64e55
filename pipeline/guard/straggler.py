"""Which rank is slower than the others, while nothing is wrong yet.

In a step all ranks wait for the slowest, so that all steps last alike. What tells ranks apart is
their own time: that of a step without the time in which they wait for others.
"""

import logging
import statistics
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.distributed.topology import Topology

logger = logging.getLogger(__name__)

# A rank is told of when it takes so many times the median, in so many windows of own time in a row.
FACTOR = 1.3
WINDOW_S = 10.0
WINDOWS = 3


class OwnTime:
    """Own time of this rank's steps, where the main thread itself computes: on a CPU.

    The scheduler counts how long the thread has run, and how long it was ready to while others had
    its core. A thread that waits for other ranks sleeps, and does neither.
    """

    def __init__(self) -> None:
        self._path = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
        self._sum_s = 0.0
        self._started_s = 0.0

    def start(self) -> None:
        """A step begins, in the thread that has made this."""
        self._started_s = self._now_s()

    def stop(self) -> None:
        """The step has ended."""
        self._sum_s += self._now_s() - self._started_s

    def take(self) -> float:
        """Seconds of the steps since the last call."""
        taken, self._sum_s = self._sum_s, 0.0
        return taken

    def _now_s(self) -> float:
        """Seconds that the thread ran or was ready to; without the latter where nobody counts."""
        try:
            ran_ns, ready_ns, _ = self._path.read_text().split()
        except (OSError, ValueError):
            return time.thread_time()
        return (int(ran_ns) + int(ready_ns)) / 1e9


class Slowest(NamedTuple):
    """The rank that takes longest, measured by those that have the same to do.

    Attributes:
        rank: which one.
        own_s: its own time in a step.
        median_s: the median own time of the ranks of its stage.
    """

    rank: int
    own_s: float
    median_s: float

    @property
    def ratio(self) -> float:
        """How many times the median it takes."""
        return self.own_s / max(self.median_s, 1e-9)


def slowest(own_s: Sequence[float], ranks_per_stage: int) -> Slowest:
    """The slowest of all ranks.

    Stages have different parts of the model, so that ranks are compared within theirs.

    Args:
        own_s: own time of each rank.
        ranks_per_stage: neighbors that have the same to do.
    """
    found = []
    for first in range(0, len(own_s), ranks_per_stage):
        stage = own_s[first : first + ranks_per_stage]
        longest = max(stage)
        rank = first + stage.index(longest)
        found.append(Slowest(rank, longest, statistics.median_low(stage)))
    return max(found, key=lambda one: one.ratio)


class Stragglers:
    """Compares ranks at each report, the same on all of them; rank 0 warns.

    Args:
        topology: the grid of ranks.
        hosts: of all ranks, in their order.
    """

    def __init__(self, topology: Topology, hosts: Sequence[str]) -> None:
        self._topology = topology
        self._hosts = hosts
        self._per_stage = len(hosts) // topology.num_stages
        self._window = [0.0] * len(hosts)
        self._steps = 0
        self._in_a_row: list[int] = []
        self._told: int | None = None
        self._last: Slowest | None = None

    def report(self, own_s: Sequence[float], steps: int) -> Slowest | None:
        """Who is slowest since the last report; None where there is nobody to compare with.

        Args:
            own_s: own time of each rank, of all steps since then.
            steps: how many these were.
        """
        if self._per_stage < 2:
            return None
        self._last = slowest([seconds / max(steps, 1) for seconds in own_s], self._per_stage)
        self._window = [sum(pair) for pair in zip(self._window, own_s, strict=True)]
        self._steps += steps
        if max(self._window) >= WINDOW_S:
            self._judge(slowest([s / self._steps for s in self._window], self._per_stage))
            self._window, self._steps = [0.0] * len(own_s), 0
        return self._last

    def told(self) -> str | None:
        """The slowest rank of the last report, in words; None before the first."""
        return self._words(self._last) if self._last else None

    def _judge(self, found: Slowest) -> None:
        """Warn once of a rank that is slow again and again, and once when it no longer is."""
        self._in_a_row = [*self._in_a_row, found.rank if found.ratio >= FACTOR else -1][-WINDOWS:]
        if len(self._in_a_row) < WINDOWS or len(set(self._in_a_row)) > 1:
            return
        rank = self._in_a_row[0] if self._in_a_row[0] >= 0 else None
        if rank == self._told or not self._topology.is_main:
            return
        self._told = rank
        if rank is None:
            logger.info("no rank is slower than the others any more")
            return
        logger.warning(
            "%s, again and again, and the others wait for it: look at its node (clocks, heat, "
            "other processes), or leave the node out",
            self._words(found),
        )

    def _words(self, one: Slowest) -> str:
        name = self._topology.describe_rank(one.rank)
        return (
            f"{name} on {self._hosts[one.rank]} takes {one.own_s:.3g} s of a step for itself, "
            f"{one.ratio:.2f} times the median of its stage"
        )
