"""The tasks of a job array, or any processes on several machines, that share only a folder.

A task claims an item by creating a file that must not exist yet. While it works it touches a file
of its own, its heartbeat; when nothing is left to claim it watches the items of the others, and
claims those of a task whose heartbeat has stopped. Items done twice give the same bytes (see
`Phase`), so a task that was only slow does no harm, and clocks need not agree: a heartbeat is a
file time that changed between two looks. The last task to see everything done commits.
"""

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

from data_prep.errors import DataError
from data_prep.shards.atomic import unwritable
from data_prep.workers.phase import Done, Observer, Phase
from data_prep.workers.pool import processes_for, watching, work_through

# About as long as network file systems keep a file time in memory.
LEASE_S = 60.0
HEARTBEAT_S = 5.0
_POLL_S = 0.5


class ArrayTask(NamedTuple):
    """Task `number` of `tasks`, counted from 0."""

    number: int
    tasks: int


def find_array_task(given: str | None, environment: Mapping[str, str]) -> ArrayTask | None:
    """The task this process is: as given ("2/8", counted from 0), or as Slurm says.

    Raises:
        DataError: What was given is not a task of an array.
    """
    if given is not None:
        match = re.fullmatch(r"(\d+)/(\d+)", given)
        if match is None or not 0 <= int(match[1]) < int(match[2]):
            raise DataError(
                f"--array-task {given} is not I/N with I from 0 to N - 1, for example 0/8 to 7/8"
            )
        return ArrayTask(int(match[1]), int(match[2]))
    number, count = (environment.get(f"SLURM_ARRAY_TASK_{name}", "") for name in ("ID", "COUNT"))
    if not number.isdecimal() or not count.isdecimal():
        return None
    first = int(environment.get("SLURM_ARRAY_TASK_MIN", "0"))
    step = max(int(environment.get("SLURM_ARRAY_TASK_STEP", "1")), 1)
    return ArrayTask((int(number) - first) // step % int(count), int(count))


class ArrayWorkers:
    """One task of an array, with its own worker processes.

    Args:
        task: Its number says where this task begins to look for items.
        claims: Folder for their claims, which all tasks reach under some path.
        processes: Worker processes of this task; None = as many as its share of the input is worth,
            up to the cores it may use.
    """

    shares_output = True

    def __init__(self, task: ArrayTask, claims: Path, processes: int | None = None) -> None:
        self._task = task
        self._processes = processes
        self._claims = Claims(claims)

    def run(self, phase: Phase, observer: Observer) -> None:
        """Do items until all are on disk, whoever did them; see `Workers.run`."""
        total = len(phase.sizes)
        first = self._task.number * total // self._task.tasks
        observer.start(phase.verb, int(phase.sizes.sum()), total)
        left = [*range(first, total), *range(first)]
        was_reported = False
        while left:
            busy: list[int] = []
            did = self._work(phase, left, busy, observer)
            if busy and not did:
                if not was_reported:
                    observer.say(
                        f"waiting for {len(busy):,} units that other tasks work on; units of dead "
                        f"tasks can be claimed again after {LEASE_S:.0f} s"
                    )
                was_reported = True
                time.sleep(_POLL_S)
            left = busy

    @contextmanager
    def claim(self, name: str) -> Iterator[None]:
        """Wait until no other live task is in this step; see `Workers.claim`."""
        while not self._claims.take(name):
            time.sleep(_POLL_S)
        try:
            yield
        finally:
            self._claims.release(name)

    def close(self) -> None:
        """Release this task's claims and stop its heartbeat."""
        self._claims.close()

    def _work(self, phase: Phase, items: list[int], busy: list[int], observer: Observer) -> int:
        """Do the items that nobody has claimed; others go to `busy`. Return how many were done."""
        did = 0

        def claimed() -> Iterator[int]:
            for item in items:
                if phase.is_finished(item):
                    observer.skip(int(phase.sizes[item]))
                elif not self._claims.take(_claim_name(phase, item)):
                    busy.append(item)
                elif phase.is_finished(item):  # by another task, between the two looks
                    self._claims.release(_claim_name(phase, item))
                    observer.skip(int(phase.sizes[item]))
                else:
                    yield item

        def collect(item: int, done: Done) -> None:
            nonlocal did
            did += 1
            self._claims.release(_claim_name(phase, item))
            observer.finish(int(phase.sizes[item]), done.tokens, done.rejects)

        work = partial(_do_unless_done, phase.work, phase.is_finished)
        share = np.array(items[: -(-len(items) // self._task.tasks)], dtype=np.int64)
        processes = self._processes or processes_for(phase, share)
        with watching(observer) as counter:
            work_through(work, claimed(), min(processes, len(items)), collect, counter)
        return did


class Claims:
    """Names that this process holds in a folder, against other processes that use it.

    Args:
        folder: Made when missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._host, self._pid = socket.gethostname(), os.getpid()
        self._sign = f"alive-{self._host}-{self._pid}-{time.time_ns()}"
        self._held: set[str] = set()
        self._watched: dict[str, tuple[int, float]] = {}
        self._closing = threading.Event()
        self._heartbeat: threading.Thread | None = None

    def take(self, name: str) -> bool:
        """Hold a name; False when another live process holds it."""
        if self._heartbeat is None:
            self._beat()
            self._heartbeat = threading.Thread(target=self._keep_beating, daemon=True)
            self._heartbeat.start()
        for _ in range(2):
            if self._create(name):
                return True
            if not self._is_abandoned(name):
                return False
            (self._folder / name).unlink(missing_ok=True)
        return False

    def release(self, name: str) -> None:
        """Stop holding a name."""
        self._held.discard(name)
        (self._folder / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Release everything; the last process to do so removes the folder."""
        self._closing.set()
        if self._heartbeat is None:
            return
        self._heartbeat.join()
        for name in (*self._held, self._sign):
            (self._folder / name).unlink(missing_ok=True)
        with suppress(OSError):
            self._folder.rmdir()

    def _create(self, name: str) -> bool:
        owner = json.dumps({"host": self._host, "pid": self._pid, "sign": self._sign})
        path = self._folder / name
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(path, "x") as file:
                self._held.add(name)  # from here on this process has to remove it
                file.write(owner)
        except FileExistsError:
            return False
        except OSError as error:
            raise unwritable(path, error) from error
        return True

    def _is_abandoned(self, name: str) -> bool:
        """True when the holder is a dead process here, or without a heartbeat for `LEASE_S`."""
        path = self._folder / name
        try:
            owner = json.loads(path.read_text())
            sign = self._folder / owner["sign"]
            if owner["host"] == self._host and not psutil.pid_exists(owner["pid"]):
                return True
        except FileNotFoundError:
            return False
        except (OSError, ValueError, LookupError):
            sign = path  # not written yet: the claim itself has to change
        try:
            shown = sign.stat().st_mtime_ns
        except OSError:
            shown = 0
        seen, since_s = self._watched.get(name, (-1, 0.0))
        if shown != seen:
            self._watched[name] = (shown, time.monotonic())
            return False
        return time.monotonic() - since_s > LEASE_S

    def _keep_beating(self) -> None:
        while not self._closing.wait(HEARTBEAT_S):
            self._beat()

    def _beat(self) -> None:
        # If this fails, for example on a full disk, the worst is that others repeat a unit.
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / self._sign).touch()


def _claim_name(phase: Phase, item: int) -> str:
    return f"{phase.name}-{item}"


def _do_unless_done(
    work: Callable[[int], Done], is_finished: Callable[[int], bool], item: int
) -> Done:
    """Do an item; a failure does not count when another task finished it meanwhile."""
    try:
        return work(item)
    except (DataError, OSError):
        if is_finished(item):
            return Done()
        raise
