"""The lease of a run's folder: one job writes into it at a time, on any machine that shares it.

A job creates `lease.json`, which must not exist yet, and changes a count in it every other second.
A second job watches the count and is refused when it changes. The lease is taken over when its
holder is provably gone:

    on this machine       its process is gone, or the number is another process's by now
    the same Slurm job    it was queued again since, so its earlier start has ended
    anywhere              the count has not changed for `EXPIRY_S` while this job watched

Clocks need not agree, nor need the file system know locks; that a file is created only once and
that what was written and closed is seen at the next open is all that is asked of it.
"""

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from foundation.json_text import read_json
from model.errors import ConfigError
from pipeline.distributed.agreement import (
    AgreedByAllRanks,
    first_problem,
    from_main,
    is_main,
)
from pipeline.distributed.processes import process_is_gone, process_space, process_start

logger = logging.getLogger(__name__)

LEASE_NAME = "lease.json"
BEAT_S = 2.0
EXPIRY_S = 30 * BEAT_S
_POLL_S = 0.25
_SEEN_WITHIN_S = 45.0  # nodes of NFS may take half a minute to see what another one has made
_COUNT_DIGITS = 12
_LONGEST_VALUE = 500  # letters

Content = dict[str, Any]


class Lease:
    """A job's right to write into a run's folder.

    Args:
        run_dir: the folder.
        environment: Slurm's variables among them.
        lost: called with the reason, in a thread, when another job has taken the lease.
        expiry_s: how long the count of another holder must stand still.
    """

    def __init__(
        self,
        run_dir: Path,
        environment: Mapping[str, str],
        *,
        lost: Callable[[str], None],
        expiry_s: float = EXPIRY_S,
    ) -> None:
        self.path = run_dir / LEASE_NAME
        self._lost = lost
        self._expiry_s = expiry_s
        self._token = secrets.token_hex(8)
        self._identity: Content = {
            "token": self._token,
            "host": socket.gethostname(),
            "processes": process_space(),
            "pid": os.getpid(),
            "process_start": process_start(os.getpid()),
            "slurm_job": environment.get("SLURM_JOB_ID"),
            "slurm_restarts": _number(environment.get("SLURM_RESTART_COUNT")),
        }
        self._count = 0
        self._descriptor: int | None = None
        self._watched: tuple[Content | None, float] | None = None
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lease; rank 0 does, all ranks wait. A collective.

        Raises:
            ConfigError: another job holds it, or the folder cannot be written.
        """
        while not from_main(self.try_acquire, ConfigError):
            time.sleep(_POLL_S)
        if is_main():
            self._thread = threading.Thread(target=self._beat, daemon=True, name="lease")
            self._thread.start()

    def try_acquire(self) -> bool:
        """Take the lease if it is free or its holder is gone; False when that is not known yet.

        Raises:
            ConfigError: another job holds it, or the folder cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._create():
                return True
            found = _read(self.path)
            if not self._is_gone(found):
                return False
            self._remove(found)
            return self._create()
        except OSError as error:
            raise ConfigError(
                f"{self.path} cannot be written ({error.strerror or error}); make the folder "
                "writable, or set another run.dir"
            ) from error

    def check_shared(self, within_s: float = _SEEN_WITHIN_S) -> None:
        """Make sure that all ranks see the folder that rank 0 writes to. A collective.

        Args:
            within_s: how long a file may need to be seen by other nodes.

        Raises:
            ConfigError: some rank has another folder of that name.
        """
        token = from_main(lambda: self._token, ConfigError)
        if problem := first_problem(self._unseen(token, within_s)):
            raise ConfigError(problem) from AgreedByAllRanks()

    def _unseen(self, token: str, within_s: float) -> str | None:
        """Why this rank does not see the lease of rank 0, if it does not."""
        deadline_s = time.monotonic() + within_s
        while _token(_read(self.path)) != token:
            if time.monotonic() > deadline_s:
                return (
                    f"run.dir={self.path.parent} on {self._identity['host']} is not the folder "
                    "that rank 0 writes to; set run.dir to a folder that all nodes share"
                )
            with contextlib.suppress(OSError):
                os.listdir(self.path.parent)  # asks the server what is there now
            time.sleep(_POLL_S)
        return None

    def release(self) -> None:
        """Give the lease back, if this job has it."""
        if self._descriptor is None:
            return
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(OSError):
            if _token(_read(self.path)) == self._token:
                self.path.unlink()
        with contextlib.suppress(OSError):
            os.close(self._descriptor)
        self._descriptor = None

    def _create(self) -> bool:
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = descriptor
        self._write()
        return True

    def _write(self) -> None:
        """Change the count; into this job's own file, also when another one has its name."""
        assert self._descriptor is not None, "the lease is not held"
        self._count += 1
        content = self._identity | {"count": f"{self._count:0{_COUNT_DIGITS}d}"}
        os.pwrite(self._descriptor, (json.dumps(content, indent=1) + "\n").encode(), 0)
        os.fsync(self._descriptor)

    def _is_gone(self, found: Content | None) -> bool:
        """Whether the holder is gone.

        Raises:
            ConfigError: it is alive.
        """
        if found is not None and self._was_queued_again(found):
            return True
        if found is not None and found.get("processes") == self._identity["processes"]:
            if process_is_gone(int(found["pid"]), found.get("process_start")):
                return True
            raise ConfigError(self._refusal(found))
        now_s = time.monotonic()
        if self._watched is None:
            self._watched = (found, now_s)
            logger.info("%s is held by %s; watching whether it is alive", self.path, _holder(found))
        before, since_s = self._watched
        if found != before:
            # Not written yet at the first look, or removed and taken meanwhile: look again.
            if before is not None and _token(found) == _token(before):
                raise ConfigError(self._refusal(found))
            self._watched = (found, now_s)
            return False
        return now_s - since_s > self._expiry_s

    def _was_queued_again(self, found: Content) -> bool:
        job = self._identity["slurm_job"]
        return (
            job is not None
            and found.get("slurm_job") == job
            and _number(found.get("slurm_restarts")) < self._identity["slurm_restarts"]
        )

    def _remove(self, found: Content | None) -> None:
        """Take away the lease of a holder that is gone, unless another job was quicker."""
        aside = self.path.with_name(f"{LEASE_NAME}.{self._token}.gone")
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return
        taken = _read(aside)
        if _token(taken) == _token(found):
            logger.info("%s was held by %s, which is gone: taken over", self.path, _holder(found))
            aside.unlink()
            return
        with contextlib.suppress(FileExistsError):  # another job's new lease: give it back
            os.link(aside, self.path)
        aside.unlink()

    def _beat(self) -> None:
        """Show that this job is alive, and see that the lease is still its own."""
        strangers = 0
        while not self._closing.wait(BEAT_S):
            found = None
            with contextlib.suppress(OSError):  # of a disk that is full or away; the next may work
                self._write()
                found = _read(self.path)
                if found is None and not self.path.exists():  # somebody deleted it
                    self._create()
            strangers = strangers + 1 if _token(found) not in (None, self._token) else 0
            if (
                strangers > 1
            ):  # a job that lost the race for the lease may hold the name for a moment
                self._lost(
                    f"{self.path} was taken over by {_holder(found)}: this process showed no sign "
                    f"of life for more than {self._expiry_s:.0f} s"
                )
                return

    def _refusal(self, found: Content | None) -> str:
        job = found.get("slurm_job") if found else None
        stop = f"scancel {job}" if job else "stop it"
        return (
            f"run.dir={self.path.parent} is in use by {_holder(found)}; wait until that job ends, "
            f"{'or stop it with ' if job else 'or '}{stop}, or set another run.dir"
        )


def _read(path: Path) -> Content | None:
    """What a lease says; None when it is not there, or not written to its end."""
    try:
        content = read_json(path)
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(content, dict) or type(content.get("pid")) is not int:
        return None
    values = [str(value) for value in content.values()]
    if any(len(value) > _LONGEST_VALUE or not value.isprintable() for value in values):
        return None
    return content


def _token(content: Content | None) -> str | None:
    return str(content.get("token")) if content is not None else None


def _holder(content: Content | None) -> str:
    if content is None:
        return "a job that has not said its name yet"
    job = f" (Slurm job {content['slurm_job']})" if content.get("slurm_job") else ""
    return f"process {content['pid']} on {content.get('host')}{job}"


def _number(text: object) -> int:
    return int(text) if isinstance(text, int | str) and str(text).isdecimal() else 0
