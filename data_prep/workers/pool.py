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
from multiprocessing.sharedctypes import Synchronized

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import DataError
from data_prep.workers import pulse
from data_prep.workers.phase import Done, Observer, Phase, announce, missing_items

_REPORT_S = 0.5


class LocalWorkers:
    """Processes of one machine.

    Args:
        processes: How many; None = as many as the input is worth, up to the cores this process may
            use. One works in this process.
    """

    shares_output = False

    def __init__(self, processes: int | None = None) -> None:
        self._processes = processes

    def run(self, phase: Phase, observer: Observer) -> None:
        """Do what is missing; see `Workers.run`."""
        missing = missing_items(phase)
        announce(phase, missing, observer)

        def collect(item: int, done: Done) -> None:
            observer.finish(int(phase.sizes[item]), done.tokens, done.rejects)

        processes = self._processes or processes_for(phase, missing)
        with watching(observer) as counter:
            work_through(
                phase.work, missing.tolist(), min(processes, len(missing)), collect, counter
            )

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


def processes_for(phase: Phase, items: NDArray[np.int64]) -> int:
    """How many processes some items of a phase are worth, up to the cores of this one."""
    worth = int(phase.sizes[items].sum()) // phase.bytes_per_worker
    return max(1, min(default_processes(), worth))


@contextmanager
def watching(observer: Observer) -> Iterator["Synchronized[int] | None"]:
    """Tell an observer now and then what the processes that get the counter have read."""
    counter = pulse.new_counter()
    if counter is None:
        yield None
        return
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(_REPORT_S):
            observer.reading(counter.value)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    pulse.count_with(counter)
    try:
        yield counter
    finally:
        pulse.count_with(None)
        stop.set()
        thread.join()


def work_through(
    work: Callable[[int], Done],
    items: Iterable[int],
    processes: int,
    collect: Callable[[int, Done], None],
    counter: "Synchronized[int] | None" = None,
) -> None:
    """Do items in worker processes, or in this one; the first failure ends all.

    Args:
        work: Does one item.
        items: Drawn one by one, about when a process is free.
        processes: How many worker processes.
        collect: Called with each finished item, in any order.
        counter: Of the text that the processes read; see `watching`.
    """
    if processes <= 1:
        for item in items:
            collect(item, work(item))
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        processes, mp_context=context, initializer=_start_worker, initargs=(counter,)
    )
    waiting = iter(items)
    running: dict[Future[Done], int] = {}
    try:
        while True:
            # Two per process keep all busy without queueing a whole corpus of tasks.
            for item in itertools.islice(waiting, 2 * processes - len(running)):
                with _interrupts_held():
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


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Have a Ctrl-C wait.

    A process started meanwhile inherits that, so that one which is still starting ends with this
    process and not with a traceback of its own.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(counter: "Synchronized[int] | None") -> None:
    """Set up a worker: one thread of encoding, and an end when (and only when) the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    pulse.count_with(counter)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    wait_for_sentinel([parent.sentinel])
    os._exit(1)
