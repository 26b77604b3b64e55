"""The ranks of an MPI job as workers: units are claimed with one-sided operations.

Rank 0 is the coordinator: it plans, prepares and commits. All ranks, rank 0 too, claim items from
a counter in a window of rank 0's memory (MPI_Fetch_and_op) and add what they did to totals beside
it. No rank waits for another until a phase ends. A rank that fails prints the reason and ends the
whole job (MPI_Abort).
"""

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import DataError, explain, printable
from data_prep.workers.phase import Done, Observer, Phase, announce, missing_items

_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_SIGNS = ("PMIX_RANK", "PMI_RANK", "PMI_FD", "PMI_PORT", "HYDI_CONTROL_FD")
_POLL_S = 0.01
_REPORT_S = 0.5
_GRACE_S = 0.5
_CLAIMS, _BYTES, _TOKENS, _REJECTS, _CELLS = range(5)


class _Assignment(NamedTuple):
    """What the coordinator sends the other ranks: items to work on."""

    work: Callable[[int], Done]
    items: NDArray[np.int64]
    sizes: NDArray[np.int64]


@dataclass(frozen=True)
class _Exit:
    """What the coordinator sends the other ranks at the end: the exit status of the job."""

    status: int


def launched_ranks(environment: Mapping[str, str]) -> int | None:
    """How many ranks an MPI launcher started; None when unknown, 1 without a launcher."""
    for name in _SIZES:
        if environment.get(name, "").isdecimal():
            return int(environment[name])
    if "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        return int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    return None if any(name in environment for name in _SIGNS) else 1


def join_world(environment: Mapping[str, str]) -> "World | None":
    """The MPI world that this process was started in; None when it was started alone.

    MPI is imported only when a launcher is seen: importing it starts it.

    Raises:
        DataError: MPI cannot be loaded, or each of several processes is a world of its own.
    """
    ranks = launched_ranks(environment)
    if ranks == 1:
        return None
    count = f"{ranks} tasks were started" if ranks else "an MPI launcher was seen"
    advice = (
        "start it with the mpirun of the same MPI (pip install mpich brings one; in Slurm: "
        "sbatch with mpirun, or srun --mpi=pmix or pmi2), as a Slurm array, or alone: one process "
        "uses all cores of its machine"
    )
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise DataError(f"{count} but MPI cannot be loaded ({error}); {advice}") from error
    if MPI.COMM_WORLD.size == 1:
        if ranks is None:
            return None
        library = MPI.Get_library_version().split("\n")[0].strip("\0 ")
        raise DataError(
            f"{count} but each is an MPI world of its own, so each would do everything: the "
            f"launcher and the MPI library ({library}) do not match; {advice}"
        )
    return World(MPI)


class World:
    """The MPI world of this job.

    Attributes:
        rank: Of this process.
        size: Number of ranks.

    Args:
        mpi: The module mpi4py.MPI.
    """

    def __init__(self, mpi: Any) -> None:
        self.mpi = mpi
        self.comm = mpi.COMM_WORLD
        self.rank: int = self.comm.rank
        self.size: int = self.comm.size
        os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def run(self, coordinate: Callable[[], int]) -> int:
        """Coordinate on rank 0 and work on the others.

        Args:
            coordinate: Rank 0's part, which runs phases through an `MpiWorkers`.

        Returns:
            The exit status, the same on all ranks.
        """
        try:
            if self.rank == 0:
                try:
                    status = coordinate()
                except SystemExit as end:
                    status = end.code if isinstance(end.code, int) else 1
                self.broadcast(_Exit(status))
                return status
            while True:
                message = self.broadcast(None)
                if isinstance(message, _Exit):
                    return message.status
                assert message is not None, "the coordinator sent nothing"
                self.work_through(message, None)
        except BaseException as error:  # whatever it is, the other ranks must not wait for this one
            self.abort(error)

    def broadcast(self, message: _Assignment | _Exit | None) -> _Assignment | _Exit | None:
        """Return rank 0's message; the others wait for it without keeping a core busy."""
        self._meet(lambda: None)
        received: _Assignment | _Exit | None = self.comm.bcast(message, root=0)
        return received

    def _meet(self, while_waiting: Callable[[], None]) -> None:
        """A barrier that sleeps; MPI's own would keep a core busy for as long as it waits."""
        arrived = self.comm.Ibarrier()
        while not arrived.Test():
            while_waiting()
            time.sleep(_POLL_S)

    def abort(self, error: BaseException) -> NoReturn:
        """Print the reason and end every rank of the job."""
        where = f"rank {self.rank}/{self.size} on {self.mpi.Get_processor_name()}"
        if isinstance(error, KeyboardInterrupt):
            status = 130
            print(f"{where} was interrupted", file=sys.stderr)
        else:
            status = 1
            error = explain(error) if isinstance(error, OSError) else error
            if not isinstance(error, DataError):
                traceback.print_exception(error)
            for line in printable(str(error)).splitlines() or [repr(error)]:
                print(f"error: {where}: {line}", file=sys.stderr)
        sys.stderr.flush()
        sys.stdout.flush()
        time.sleep(_GRACE_S)  # launchers drop what they have not passed on when they end a job
        self.comm.Abort(status)
        os._exit(status)  # MPICH's abort returns while the launcher ends the job

    def work_through(self, assignment: _Assignment, observer: Observer | None) -> None:
        """Claim and do items until none is left anywhere; every rank calls this.

        Args:
            assignment: The same on all ranks.
            observer: Notified of the totals over all ranks, on rank 0.
        """
        mpi = self.mpi
        window = mpi.Win.Allocate(8 * _CELLS if self.rank == 0 else 0, 8, comm=self.comm)
        if self.rank == 0:
            np.frombuffer(window.tomemory(), dtype=np.int64)[:] = 0
        self.comm.Barrier()
        window.Lock_all(mpi.MODE_NOCHECK)
        totals = _Totals(mpi, window)
        try:
            with self._progress(totals, observer) as report:
                while (claim := totals.add(_CLAIMS, 1)) < len(assignment.items):
                    item = int(assignment.items[claim])
                    done = assignment.work(item)
                    totals.add(_BYTES, int(assignment.sizes[item]))
                    totals.add(_TOKENS, done.tokens)
                    totals.add(_REJECTS, done.rejects)
                    report()
                self._meet(report)
        except BaseException as error:
            self.abort(error)
        window.Unlock_all()
        window.Free()

    @contextmanager
    def _progress(
        self, totals: "_Totals", observer: Observer | None
    ) -> Iterator[Callable[[], None]]:
        """Report the totals now and then, and keep one-sided operations going on rank 0.

        Between nodes, an MPI may serve operations on rank 0's window only while rank 0 is inside
        an MPI call. A thread calls MPI all the time, so that no rank waits for rank 0's unit.
        """
        lock, last_s = threading.Lock(), 0.0

        def report() -> None:
            nonlocal last_s
            if (
                observer is not None
                and time.monotonic() - last_s >= _REPORT_S
                and lock.acquire(False)
            ):
                last_s = time.monotonic()
                totals.report(observer)
                lock.release()

        stop, server = threading.Event(), None
        if self.rank == 0 and self.mpi.Query_thread() == self.mpi.THREAD_MULTIPLE:

            def serve() -> None:
                while not stop.wait(_POLL_S):
                    self.comm.Iprobe()
                    report()

            server = threading.Thread(target=serve, daemon=True)
            server.start()
        yield report
        stop.set()
        if server is not None:
            server.join()
        if observer is not None:
            totals.report(observer)


class _Totals:
    """Counters in a window of rank 0's memory."""

    def __init__(self, mpi: Any, window: Any) -> None:
        self._mpi, self._window = mpi, window
        self._reported = np.zeros(_CELLS, dtype=np.int64)

    def add(self, cell: int, value: int) -> int:
        """Add to a counter; return what it was before."""
        before = np.zeros(1, dtype=np.int64)
        self._window.Fetch_and_op(np.array([value], np.int64), before, 0, cell, self._mpi.SUM)
        self._window.Flush(0)
        return int(before[0])

    def report(self, observer: Observer) -> None:
        """Report to an observer what was added since the last time."""
        now = np.array([self.add(cell, 0) for cell in range(_CELLS)], dtype=np.int64)
        _, *new = (now - self._reported).tolist()
        self._reported = now
        if any(new):
            observer.finish(*new)


class MpiWorkers:
    """All ranks of the world, with rank 0 as their coordinator.

    Args:
        world: The world this process is rank 0 of.
    """

    shares_output = False

    def __init__(self, world: World) -> None:
        assert world.rank == 0, world.rank
        self._world = world

    def run(self, phase: Phase, observer: Observer) -> None:
        """Do what is missing on all ranks; see `Workers.run`."""
        missing = missing_items(phase)
        if not len(missing):
            return
        observer.say(f"{self._world.size} MPI ranks")
        announce(phase, missing, observer)
        assignment = _Assignment(phase.work, missing, phase.sizes)
        self._world.broadcast(assignment)
        self._world.work_through(assignment, observer)

    @contextmanager
    def claim(self, name: str) -> Iterator[None]:
        """Nobody else works on this output; see `Workers.claim`."""
        del name
        yield

    def close(self) -> None:
        """Nothing is held."""
