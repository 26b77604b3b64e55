"""A heartbeat per rank, so that a dead or stuck rank ends the job and is named.

A collective waits without end (NCCL) or fails without saying who is missing (gloo). Here each rank
writes a sign of life into the job's key-value store every second or two and watches its right
neighbor; whoever finds a silent one publishes the verdict, and all ranks stop.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from pipeline.distributed.processes import process_is_gone, process_space
from pipeline.distributed.topology import Topology

logger = logging.getLogger(__name__)

_BEAT_S = 1.0
_GRACE_S = 5.0
_VERDICT = "headway/verdict"


class Watchdog:
    """Beats and watches in a thread of its own until closed.

    Args:
        topology: the grid of ranks.
        timeout_s: silence after which a rank counts as dead.
        step: the step this rank is in, for the message; None before the first.
        waiting_for: what this rank waits for from other ranks, if anything, for the message.
        abort: called with the verdict when the main thread did not end by itself in time.
    """

    def __init__(
        self,
        topology: Topology,
        *,
        timeout_s: float,
        step: Callable[[], int | None],
        waiting_for: Callable[[], str | None],
        abort: Callable[[str], None],
    ) -> None:
        self.verdict: str | None = None
        self._info = topology.info
        self._timeout_s = timeout_s
        self._step = step
        self._waiting_for = waiting_for
        self._abort = abort
        self._stop = threading.Event()
        self._decided = threading.Event()
        self._finished = False
        self._thread: threading.Thread | None = None
        self._answered_s = time.monotonic()
        self._woke_s = 0.0
        if topology.info.world_size > 1:
            # A connection of its own: the main thread's may be blocked inside a collective.
            shared: Any = dist.distributed_c10d._get_default_store()
            self._store: Any = shared.clone()
            self._identity = {
                "host": socket.gethostname(),
                "processes": process_space(),
                "pid": os.getpid(),
                "name": topology.describe(),
            }
            self._beat(0)
            dist.barrier()  # everybody has beaten once: from here on, silence means something
            self._thread = threading.Thread(target=self._run, daemon=True, name="watchdog")
            self._thread.start()
            threading.Thread(target=self._watch_store, daemon=True, name="watchdog-store").start()

    def explain(self) -> str | None:
        """After a collective failed: wait for the verdict that names the culprit, if one comes."""
        if self._thread is not None:
            self._decided.wait(self._timeout_s + 4 * _BEAT_S)
        return self.verdict

    def close(self) -> None:
        """This rank is done and will fall silent; its neighbor is told."""
        if self._thread is not None:
            self._finished = True
            self._stop.set()
            self._thread.join(4 * _BEAT_S)

    def _run(self) -> None:
        count, seen, seen_s = 0, None, time.monotonic()
        neighbor = (self._info.rank + 1) % self._info.world_size
        try:
            while not self._wait():
                count += 1
                self._beat(count)
                if self._store.check([_VERDICT]):
                    self._decide(self._store.get(_VERDICT).decode())
                    return
                beat = json.loads(self._store.get(_key(neighbor)))
                if beat != seen or self._woke_s > seen_s:
                    seen, seen_s = beat, time.monotonic()
                self._answered_s = time.monotonic()
                silent_s = self._answered_s - seen_s
                if beat["finished"]:
                    continue
                if reason := self._death(beat, silent_s):
                    step = beat["step"]
                    when = "while it started" if step is None else f"in step {step}"
                    message = f"{beat['name']} {reason}; its last sign of life was {when} "
                    message += f"(process {beat['pid']} on {beat['host']})"
                    if beat["waiting_for"]:
                        message += f", waiting for {beat['waiting_for']}"
                    self._store.set(_VERDICT, message)
                    self._decide(message)
                    return
            self._beat(count + 1)
        except (RuntimeError, ValueError) as error:
            # The store lives in rank 0 or in its launcher.
            if not self._stop.is_set():
                self._decide(
                    "rank 0 or its launcher has died: the job's store does not answer "
                    f"({str(error).splitlines()[0]})"
                )

    def _wait(self) -> bool:
        """Sleep until the next beat; true when closed.

        A sleep that took far too long means that this process was suspended, and the others with
        it perhaps: their silence counts from now on.
        """
        before_s = time.monotonic()
        closed = self._stop.wait(_BEAT_S)
        if time.monotonic() - before_s > _BEAT_S + _GRACE_S:
            self._woke_s = time.monotonic()
        return closed

    def _watch_store(self) -> None:
        """A store whose process is frozen never answers and never fails; only a clock sees it."""
        while not self._wait() and not self._decided.is_set():
            silent_s = time.monotonic() - max(self._answered_s, self._woke_s)
            if silent_s > self._timeout_s:
                self._decide(
                    "rank 0 or its launcher has not answered for "
                    f"{silent_s:.0f} s: the job's store is silent"
                )

    def _beat(self, count: int) -> None:
        beat = {
            **self._identity,
            "count": count,
            "step": self._step(),
            "waiting_for": self._waiting_for(),
            "finished": self._finished,
        }
        self._store.set(_key(self._info.rank), json.dumps(beat))

    def _death(self, beat: dict[str, Any], silent_s: float) -> str | None:
        if beat["processes"] == self._identity["processes"] and process_is_gone(beat["pid"]):
            return "has died"
        if silent_s > self._timeout_s:
            return f"has not answered for {silent_s:.0f} s"
        return None

    def _decide(self, verdict: str) -> None:
        """Publish to this process; end it when the main thread cannot."""
        self.verdict = verdict
        self._decided.set()
        logger.error("%s", verdict)
        if not self._stop.wait(_GRACE_S):
            self._abort(verdict)


def _key(rank: int) -> str:
    return f"headway/beat/{rank}"
