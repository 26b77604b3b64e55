"""A main thread that hangs, on any rank: found by a clock, told with the stacks of all ranks.

A process whose main thread hangs still beats, and collectives of others wait for it without a
word. Here each rank's thread watches its own main thread. The first that finds it over its bound
tells the others through the job's store; every rank writes down its stacks and where its main
thread is; then all know who is late, and end.
"""

import json
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch.distributed as dist

from pipeline.distributed.topology import Topology
from pipeline.guard.progress import Doing, Progress

logger = logging.getLogger(__name__)

STALLS = "stalls"
_POLL_S = 1.0
# A poll that took so much longer means that the process was suspended.
_SUSPENDED_S = 5.0
_COLLECT_S = 15.0
_FOUND = "headway/stall/found"
_OUR_FILES = str(Path(__file__).resolve().parents[2])


class Place(NamedTuple):
    """Where a rank's main thread is.

    Attributes:
        rank: which rank, as errors name it.
        host: its node.
        number: of phases that it has behind it.
        phase: what it is doing.
        seconds: for how long.
        line: the innermost line of this project, as `file:line (function)`.
        collective: the collective or transfer that it waits in; None for none.
    """

    rank: str
    host: str
    number: int
    phase: str
    seconds: float
    line: str
    collective: str | None

    def told(self) -> str:
        """In one line."""
        waits = f"waits in {self.collective} at" if self.collective else "is at"
        return (
            f"{self.rank} on {self.host} {waits} {self.line}, {self.phase} {self.number}, for "
            f"{self.seconds:.0f} s"
        )


def late(places: Sequence[Place]) -> list[Place]:
    """Those whom the others wait for; empty when all wait alike.

    Ranks that have fewer phases behind them; among equals those that are in no collective while
    others are.
    """
    fewest = min(place.number for place in places)
    behind = [place for place in places if place.number == fewest]
    if len(behind) < len(places):
        return behind
    outside = [place for place in places if place.collective is None]
    return outside if len(outside) < len(places) else []


def verdict(places: Sequence[Place], bound_s: float, learned: int) -> str:
    """What happened, in one line.

    Args:
        places: of all ranks that answered.
        bound_s: what was exceeded.
        learned: from how many phases that bound comes.
    """
    source = f"ten times the longest of {learned}" if learned else "the first of its kind"
    late_ones = late(places)
    if not late_ones:
        who = "no rank is behind the others: " + places[0].told()
    else:
        who = "; ".join(place.told() for place in late_ones[:3])
        if len(late_ones) > 3:
            who += f"; and {len(late_ones) - 3} more"
        others = [place for place in places if place not in late_ones]
        if others:
            who += f"; of the others {others[0].told()}"
    return f"nothing has moved for more than {bound_s:.0f} s ({source}): {who}"


class StallWatch:
    """Watches this rank's main thread, in a thread of its own, until closed.

    Args:
        topology: the grid of ranks.
        progress: of the main thread.
        host: of this rank.
        run_dir: below it stacks are written, in `stalls/`.
        straggler: the rank that was slowest before, in words.
        abort: called with the verdict; does not return.
    """

    def __init__(
        self,
        topology: Topology,
        progress: Progress,
        *,
        host: str,
        run_dir: Path,
        straggler: Callable[[], str | None] = lambda: None,
        abort: Callable[[str], None],
    ) -> None:
        self._topology = topology
        self._progress = progress
        self._host = host
        self._stalls = run_dir / STALLS
        self._straggler = straggler
        self._abort = abort
        self._main = threading.main_thread().ident or 0
        self._closed = threading.Event()
        self._woke_s = 0.0
        shared: Any = dist.distributed_c10d._get_default_store()
        self._store: Any = shared.clone()
        self._thread = threading.Thread(target=self._run, daemon=True, name="stall-watch")
        self._thread.start()

    def close(self) -> None:
        """Watch no longer."""
        self._progress.leave()
        self._closed.set()
        self._thread.join(4 * _POLL_S)

    def _run(self) -> None:
        try:
            while not self._wait():
                if self._store.check([_FOUND]):
                    self._end(json.loads(self._store.get(_FOUND)))
                elif (doing := self._progress.doing) and self._seconds(doing) > (
                    bound_s := self._progress.bound_s(doing.phase)
                ):
                    found = {
                        "name": time.strftime("%Y-%m-%dT%H-%M-%S"),
                        "bound_s": bound_s,
                        "learned": self._progress.learned(doing.phase),
                    }
                    # The first one's word holds.
                    self._store.compare_set(_FOUND, "", json.dumps(found))
        except (RuntimeError, ValueError) as error:
            # The store is gone, and with it the job: the heartbeat says so.
            logger.debug("the stall watch ends: %s", error)

    def _wait(self) -> bool:
        """Sleep until the next look; true when closed."""
        before_s = time.monotonic()
        closed = self._closed.wait(_POLL_S)
        if time.monotonic() - before_s > _POLL_S + _SUSPENDED_S:
            self._woke_s = time.monotonic()
        return closed

    def _seconds(self, doing: Doing) -> float:
        return time.monotonic() - max(doing.since_s, self._woke_s)

    def _end(self, found: dict[str, Any]) -> None:
        """Write down where this rank is, read where the others are, and end."""
        folder = self._stalls / found["name"]
        self._store.set(_key(self._topology.info.rank), json.dumps(self._place()._asdict()))
        self._write_stacks(folder)
        places = self._places()
        told = verdict(places, found["bound_s"], found["learned"])
        if silent := self._topology.info.world_size - len(places):
            told += f"; {silent} ranks did not answer"
        told += f"; stacks of all ranks are in {folder}"
        if self._topology.is_main:
            lines = [told, *(place.told() for place in places)]
            if slowest := self._straggler():
                lines.append(f"slowest in the last steps: {slowest}")
            self._write(folder / "summary.txt", "\n".join(lines) + "\n")
        logger.error("%s", told)
        self._abort(told)

    def _places(self) -> list[Place]:
        """Where all ranks are that answer in time; those that are furthest behind first."""
        places, deadline_s = [], time.monotonic() + _COLLECT_S
        for rank in range(self._topology.info.world_size):
            while not self._store.check([_key(rank)]) and time.monotonic() < deadline_s:
                time.sleep(_POLL_S / 10)
            if self._store.check([_key(rank)]):
                places.append(Place(**json.loads(self._store.get(_key(rank)))))
        return sorted(places, key=lambda place: place.number)

    def _place(self) -> Place:
        doing = self._progress.doing or Doing("start", 0, time.monotonic())
        frame = sys._current_frames().get(self._main)
        line, collective = where(frame)
        return Place(
            rank=self._topology.describe(),
            host=self._host,
            number=doing.number,
            phase=doing.phase,
            seconds=self._seconds(doing),
            line=line,
            collective=collective,
        )

    def _write_stacks(self, folder: Path) -> None:
        """Of all threads of this process."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        parts = [
            f"thread {names.get(thread, thread)}:\n{''.join(traceback.format_stack(frame))}"
            for thread, frame in sys._current_frames().items()
        ]
        self._write(folder / f"rank_{self._topology.info.rank:05d}.txt", "\n".join(parts))

    def _write(self, path: Path, text: str) -> None:
        """Write a file; what keeps it from being written must not keep the job from ending."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            logger.error("no room for stacks in %s: %s", path, error)


def where(frame: FrameType | None) -> tuple[str, str | None]:
    """A thread's innermost line of this project, and the collective it is in, if any."""
    collective, line = None, "an unknown place"
    for step in reversed(traceback.extract_stack(frame) if frame else []):
        if collective is None and "torch/distributed/" in step.filename.replace("\\", "/"):
            collective = step.name
        elif step.filename.startswith(_OUR_FILES) and "site-packages" not in step.filename:
            place = Path(step.filename).relative_to(_OUR_FILES)
            line = f"{place}:{step.lineno} ({step.name})"
            break
    return line, collective


def _key(rank: int) -> str:
    return f"headway/stall/{rank}"
