"""Worker processes on this machine."""

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for_sentinel

from data_prep.errors import DataError
from data_prep.workers.phase import Done, Observer, Phase, announce, missing_items


class LocalWorkers:
    """Processes of one machine.

    Args:
        processes: How many; None = the cores this process may use. One works in this process.
    """

    shares_output = False

    def __init__(self, processes: int | None = None) -> None:
        self._processes = processes or default_processes()

    def run(self, phase: Phase, observer: Observer) -> None:
        """Do what is missing; see `Workers.run`."""
        missing = missing_items(phase)
        announce(phase, missing, observer)

        def collect(item: int, done: Done) -> None:
            observer.finish(int(phase.sizes[item]), done.tokens, done.rejects)

        work_through(phase.work, missing.tolist(), min(self._processes, len(missing)), collect)

    @contextmanager
    def claim(self, name: str) -> Iterator[None]:
        """Nobody else works on this output; see `Workers.claim`."""
        del name
        yield

    def close(self) -> None:
        """Nothing is held."""


def default_processes() -> int:
    """The number of cores this process may use."""
    return len(os.sched_getaffinity(0))


def work_through(
    work: Callable[[int], Done],
    items: Iterable[int],
    processes: int,
    collect: Callable[[int, Done], None],
) -> None:
    """Do items in worker processes, or in this one; the first failure ends all.

    Args:
        work: Does one item.
        items: Drawn one by one, about when a process is free.
        processes: How many worker processes.
        collect: Called with each finished item, in any order.
    """
    if processes <= 1:
        for item in items:
            collect(item, work(item))
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker)
    waiting = iter(items)
    running: dict[Future[Done], int] = {}
    try:
        while True:
            # Two per process keep all busy without queueing a whole corpus of tasks.
            for item in itertools.islice(waiting, 2 * processes - len(running)):
                running[pool.submit(work, item)] = item
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                collect(running.pop(future), future.result())
    except KeyboardInterrupt:
        # Units in work would take long to finish, and a killed build loses only those.
        for worker in multiprocessing.active_children():
            worker.kill()
        raise
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed, most likely for lack of memory; run the same command "
            "again with fewer --workers (finished units are kept)"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Set up a worker: one thread of encoding, and an end when (and only when) the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    wait_for_sentinel([parent.sentinel])
    os._exit(1)
