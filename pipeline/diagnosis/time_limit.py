"""Ends the job when a check hangs, and says which one and on which rank.

A rank that hangs, in a collective or in a file system, cannot say so; a thread of its own can. The
ranks note in the store where they met how far each has come, so that any of them knows which is
late.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from pipeline.distributed.rendezvous import RankInfo

# Rank 0 speaks first; the others only when it does not, in the time that it takes to find out.
_OTHERS_WAIT_S = 6.0
_CLEANING_S = 5.0
_SHOWN = 8
_BEAT_S, _SILENT_S = 0.5, 2.5


def meeting_store() -> Any:  # dist.Store, for which torch has no types
    """A part of the store where the ranks met, for what is noted here."""
    # A connection of its own: one that waits in a collective's store call answers nothing else.
    store: Any = dist.distributed_c10d._get_default_store()
    return dist.PrefixStore("headway/doctor", store.clone())  # type: ignore[attr-defined]


class TimeLimit:
    """Watches one check after the other.

    Args:
        store: where the ranks met.
        info: this rank's position.
        seconds: that a check of patience 1 may take.
        clean: called, in a thread, before the process ends.
    """

    def __init__(
        self, store: Any, info: RankInfo, seconds: float, clean: Callable[[], None]
    ) -> None:
        self._store, self._info, self._seconds, self._clean = store, info, seconds, clean
        self._number = 0
        self._over = threading.Event()
        threading.Thread(target=self._beat, daemon=True, name="sign of life").start()

    @contextmanager
    def watch(self, name: str, patience: float = 1.0) -> Iterator[None]:
        """What happens in here has to end in time, or the process does."""
        self._number += 1
        self._note("begun", socket.gethostname())
        self._over = threading.Event()
        allowed_s = self._seconds * patience
        threading.Thread(
            target=self._wait, args=(self._over, name, allowed_s), daemon=True, name="time limit"
        ).start()
        try:
            yield
        finally:
            self._over.set()

    def looked(self, failure: str | None) -> None:
        """This rank has looked, and now waits for the others."""
        self._note("looked", failure or "")

    def _wait(self, over: threading.Event, name: str, allowed_s: float) -> None:
        waited_s = allowed_s + (_OTHERS_WAIT_S if self._info.rank else 0.0)
        if over.wait(waited_s):
            return
        if self._info.rank == 0 or not self._is_noted("verdict", 0):
            verdict = f"the check {name!r} did not end within {allowed_s:g} s: {self._late()}"
            print(f"error: {verdict}; nothing was checked after it", file=sys.stderr, flush=True)
        if self._info.rank == 0:
            self._note("verdict", "said")
            cleaning = threading.Thread(target=self._clean, daemon=True)
            cleaning.start()
            cleaning.join(_CLEANING_S)
            time.sleep(_OTHERS_WAIT_S + 1)  # the store may end with this rank
        os._exit(1)

    def _late(self) -> str:
        """Which ranks have not looked to the end, or which one has failed in a collective."""
        ranks = range(self._info.world_size)
        if silent := self._silent():
            return f"{self._names(silent)} shows no sign of life; look at that process and its node"
        for rank in ranks:
            if failure := self._noted("looked", rank):
                return f"rank {rank} failed there ({failure}), and the others wait for it"
        absent = [rank for rank in ranks if not self._is_noted("begun", rank)]
        if absent:
            return f"{self._names(absent)} did not come to it; look there for a hung process"
        late = [rank for rank in ranks if not self._is_noted("looked", rank)]
        if late:
            return f"{self._names(late)} still in it; look there for a device that does not answer"
        return "all ranks looked, and the exchange of what they saw hangs; check the network"

    def _beat(self) -> None:
        """Show that this process lives, whatever its main thread waits for."""
        with contextlib.suppress(RuntimeError):  # the store has ended with rank 0
            while True:
                self._store.add(f"beats/{self._info.rank}", 1)
                time.sleep(_BEAT_S)

    def _silent(self) -> list[int]:
        """The ranks that do not beat."""
        keys = [f"beats/{rank}" for rank in range(self._info.world_size)]
        try:
            before = [self._store.add(key, 0) for key in keys]
            time.sleep(_SILENT_S)
            after = [self._store.add(key, 0) for key in keys]
        except RuntimeError:
            return []
        pairs = enumerate(zip(before, after, strict=True))
        return [rank for rank, (first, last) in pairs if first == last]

    def _names(self, ranks: list[int]) -> str:
        hosts = {rank: self._noted("begun", rank) for rank in ranks[:_SHOWN]}
        shown = [f"rank {rank}{f' on {host}' if host else ''}" for rank, host in hosts.items()]
        more = len(ranks) - len(shown)
        return ", ".join(shown) + (f" and {more} more" if more else "")

    def _note(self, what: str, text: str) -> None:
        self._store.set(f"{self._number}/{what}/{self._info.rank}", text)

    def _is_noted(self, what: str, rank: int) -> bool:
        try:
            return bool(self._store.check([f"{self._number}/{what}/{rank}"]))
        except RuntimeError:  # the store has ended with rank 0
            return False

    def _noted(self, what: str, rank: int) -> str:
        key = f"{self._number}/{what}/{rank}"
        return self._store.get(key).decode() if self._is_noted(what, rank) else ""
