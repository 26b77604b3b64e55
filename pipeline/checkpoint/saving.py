"""Saving while training goes on: each rank writes in a thread, all commit at a step they agree on.

    step            what happens in it, on every rank together
    due             rank 0 makes the folder; each copies its share to host memory; threads write
    the next ones   a flag goes with the step's exchange: has every rank written?
    the first yes   problems and checksums are exchanged; a thread of rank 0 commits
    the next ones   has rank 0 committed? then, or when there were problems, the save has ended

Threads write, sync, read back, checksum and commit, and never communicate. Without
`checkpoint.asynchronous` nothing is copied: they write the live tensors, and training waits.
"""

import functools
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from foundation.durable_files import sync_folder, write_synced
from model.errors import CheckpointError
from model.structure.freezing import is_trained
from pipeline.checkpoint.crash_points import crash_point, saving, thread_of_save
from pipeline.checkpoint.file_names import (
    IMPORTED,
    RESOLVED_CONFIG_NAME,
    STATE_NAME,
    TOKENIZER,
    WEIGHTS,
)
from pipeline.checkpoint.files import Entries
from pipeline.checkpoint.folder import CheckpointFolder
from pipeline.checkpoint.host_copy import HostCopy
from pipeline.checkpoint.sharded_tensors import Snapshot, missing_state
from pipeline.checkpoint.train_state import TrainState
from pipeline.config.run_config import RunConfig, to_yaml
from pipeline.distributed.agreement import first_problem, from_all, from_main, is_main

logger = logging.getLogger(__name__)

_POLL_S = 0.02


class _Flight:
    """A save that was begun: what this rank does for it, in a thread.

    Args:
        step: the step that is saved.
        last: whether the run ends with it.
        begun_s: when the save began.
    """

    def __init__(self, step: int, last: bool, begun_s: float) -> None:
        self.step = step
        self.last = last
        self.begun_s = begun_s
        self.stall_s = 0.0
        self.problem: str | None = None
        self.entries: Entries = {}
        self.agreed = False
        self.folder: Path | None = None
        self._thread: threading.Thread | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin a part of the work."""

        def run() -> None:
            try:
                work()
            except Exception as error:  # whatever it is, the run must hear of it
                logger.debug("saving step %d failed", self.step, exc_info=True)
                self.problem = reason(error)

        self._thread = thread_of_save(run, f"save of step {self.step}")
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether this rank has done its part, one way or the other."""
        return self._thread is None or not self._thread.is_alive()


class Saver:
    """Saves a run's progress when told to, and knows how that ended.

    All methods but `figures` are collectives: every rank calls them together.

    Args:
        checkpoints: where to save.
        config: the run, saved resolved.
        device: where the ranks' collectives run.
        tokenizer: the tokenizer.json the data was made with.
        resumed_step: the step whose checkpoint the run goes on from; 0 for a new run.
        missing: what the tensor files in a folder lack of the model, a line each; a save whose
            files lack something fails. None = what the run's configuration asks for.
        imported: what the model that the run began with is beside its weights, as JSON.
        took: told how many seconds a save lasted, from its beginning until it was committed.
    """

    def __init__(
        self,
        checkpoints: CheckpointFolder,
        config: RunConfig,
        device: torch.device,
        tokenizer: Path,
        resumed_step: int,
        missing: Callable[[Path], list[str]] | None = None,
        imported: str | None = None,
        took: Callable[[float], None] = lambda _seconds: None,
    ) -> None:
        self._took = took
        self.checkpoints = checkpoints
        self.saved_step: int | None = resumed_step or None
        self._config = config
        self._device = device
        self._tokenizer = tokenizer
        self._imported = {} if imported is None else {IMPORTED: imported}
        self._missing = missing or functools.partial(
            missing_state,
            config=config.model,
            trained=functools.partial(is_trained, freeze=config.train.freeze),
        )
        self._memory = HostCopy()
        self._flight: _Flight | None = None
        self._figures: dict[str, float] = {}

    def begin(
        self,
        state: TrainState,
        take: Callable[[], Snapshot],
        *,
        asynchronous: bool,
        last: bool = False,
        beside: Callable[[], None] = lambda: None,
        more: Callable[[Path], Entries] | None = None,
    ) -> None:
        """Begin to save; an earlier save is finished first.

        Args:
            state: progress to save.
            take: a collective that gives this rank's live tensors.
            asynchronous: copy them, so that they may change before `finish`.
            last: the run ends with it, so a failure is an error whatever the policy.
            beside: what else is to be on the disk before the checkpoint counts; in the thread.
            more: writes further files of this rank into the checkpoint's folder; in the thread.

        Raises:
            CheckpointError: an earlier save failed, and the run is to stop then.
        """
        self.finish(f"step {state.step} is due to be saved")
        flight = _Flight(state.step, last, time.monotonic())
        with saving(flight.step):
            self._begin(flight, state, take, asynchronous, beside, more)
        self._flight = flight
        flight.stall_s = time.monotonic() - flight.begun_s

    def _begin(
        self,
        flight: _Flight,
        state: TrainState,
        take: Callable[[], Snapshot],
        asynchronous: bool,
        beside: Callable[[], None],
        more: Callable[[Path], Entries] | None,
    ) -> None:
        """Make the folder, take the tensors, and let a thread write them."""
        crash_point("before-snapshot")
        try:
            partial = from_main(lambda: self.checkpoints.prepare(flight.step), OSError)
            snapshot = self._host_copy(take()) if asynchronous else take()
        except OSError as error:
            flight.problem = reason(error)
        else:
            texts = self._texts(state) if is_main() else {}

            def write() -> None:
                beside()
                flight.entries = _write(partial, snapshot, texts, self._tokenizer)
                if more is not None:
                    flight.entries |= more(partial)

            flight.start(write)
        crash_point("after-snapshot")

    @property
    def is_done(self) -> bool:
        """Whether this rank has nothing left to do for the save in flight; told to the others."""
        return self._flight is None or self._flight.is_done

    def advance(self, *, all_done: bool) -> None:
        """After each step: go on with a save if all ranks can.

        Args:
            all_done: every rank's `is_done`, as agreed during the step.

        Raises:
            CheckpointError: the save failed, and the run is to stop then.
        """
        if self._flight is not None and all_done:
            self._go_on(self._flight)

    def finish(self, why: str = "") -> None:
        """Wait until a save that was begun is committed, or has failed.

        Ranks ask each other again and again, so that no collective lasts as long as a slow disk.

        Args:
            why: what waits; said in the log when there is something to wait for.

        Raises:
            CheckpointError: the save failed, and the run is to stop then.
        """
        if self._flight is not None and why:
            logger.info("waiting for the save of step %d: %s", self._flight.step, why)
        while (flight := self._flight) is not None:
            started_s = time.monotonic()
            done = torch.tensor(int(flight.is_done), dtype=torch.int32, device=self._device)
            dist.all_reduce(done, op=dist.ReduceOp.MIN)
            if not done:
                time.sleep(_POLL_S)
            flight.stall_s += time.monotonic() - started_s
            if done:
                self._go_on(flight)

    def close(self) -> None:
        """Wait for deletions that are going on; on rank 0."""
        self.checkpoints.finish_deletions()

    def figures(self) -> dict[str, float]:
        """Of the saves that ended since the last call, for the metrics."""
        figures, self._figures = self._figures, {}
        return figures

    def _texts(self, state: TrainState) -> dict[str, str]:
        """What rank 0 writes beside its tensors, as it is now."""
        texts = {STATE_NAME: state.to_json(), RESOLVED_CONFIG_NAME: to_yaml(self._config)}
        return texts | self._imported

    def _host_copy(self, snapshot: Snapshot) -> Snapshot:
        try:
            return self._memory.take(snapshot)
        except (RuntimeError, MemoryError) as error:
            raise OSError(
                f"no room for a copy in the host's memory ({reason(error)}); set "
                "checkpoint.asynchronous=false"
            ) from error

    def _go_on(self, flight: _Flight) -> None:
        """Take the next step of a save; all ranks are done with the last."""
        started_s = time.monotonic()
        with saving(flight.step):
            self._end(flight) if flight.agreed else self._agree(flight)
        flight.stall_s += time.monotonic() - started_s
        if self._flight is None:
            self._report(flight)

    def _agree(self, flight: _Flight) -> None:
        """All have written: rank 0 begins to commit, unless one has failed."""
        crash_point("before-agreement")
        flight.problem = first_problem(flight.problem)
        parts = from_all(flight.entries)
        crash_point("after-agreement")
        flight.agreed = True
        if flight.problem is not None:
            self._end(flight)
        elif is_main():
            entries = {name: entry for part in parts for name, entry in part.items()}

            def commit() -> None:
                flight.folder = self.checkpoints.commit(flight.step, entries, self._missing)

            flight.start(commit)

    def _end(self, flight: _Flight) -> None:
        """Rank 0 has committed, or could not."""
        flight.folder, flight.problem = from_main(lambda: (flight.folder, flight.problem), OSError)
        crash_point("after-commit")
        self._flight = None

    def _report(self, flight: _Flight) -> None:
        """Say how a save ended; the same on all ranks."""
        if flight.problem is not None:
            self._fail(flight, flight.problem)
            return
        self.saved_step = flight.step
        total_s = time.monotonic() - flight.begun_s
        self._took(total_s)
        self._figures |= {"save_stall_s": flight.stall_s, "save_total_s": total_s}
        logger.info(
            "saved %s in %.2f s; training waited %.2f s", flight.folder, total_s, flight.stall_s
        )

    def _fail(self, flight: _Flight, problem: str) -> None:
        """Follow `checkpoint.on_error`."""
        self._figures["save_failed"], step = 1, flight.step
        message = f"step {step} could not be saved below {self.checkpoints.directory}: {problem} "
        message += from_main(lambda: self.checkpoints.discard(step), OSError)
        remedy = "make room there or make the folder writable"
        if flight.last:
            raise CheckpointError(
                f"{message}; it was the last save of the run: {remedy}, then run the same command "
                "again: it resumes from the newest checkpoint and trains anew what came after it"
            )
        if self._config.checkpoint.on_error == "stop":
            raise CheckpointError(
                f"{message}; checkpoint.on_error=stop, so the run stops: {remedy}, then start it "
                "again"
            )
        every = self._config.checkpoint.every_steps
        again = f"at step {(step // every + 1) * every}, or" if every else "at the latest"
        logger.error(
            "SAVE FAILED: %s; the run goes on (checkpoint.on_error=warn) and saves again %s when "
            "it ends: %s before then",
            message,
            again,
            remedy,
        )


def reason(error: Exception) -> str:
    """An error in one line."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if isinstance(error, OSError) else f"{type(error).__name__}: {line}"


def _write(partial: Path, snapshot: Snapshot, texts: dict[str, str], tokenizer: Path) -> Entries:
    """Write this rank's files through to the disk; rank 0 writes the texts, too.

    Returns:
        What the files are, by name below the checkpoint.

    Raises:
        OSError: one cannot be written.
    """
    if texts:
        crash_point("after-folder")
    path = partial / WEIGHTS / snapshot.file_name
    entries = {f"{WEIGHTS}/{path.name}": snapshot.write(path.parent)}
    sync_folder(path.parent)
    crash_point("weights-checked")
    for name, text in texts.items():
        entries[name] = write_synced(partial / name, text.encode())
        crash_point("state-half-written", halve=partial / name)
    if texts:
        entries[TOKENIZER] = write_synced(partial / TOKENIZER, tokenizer.read_bytes())
    return entries
