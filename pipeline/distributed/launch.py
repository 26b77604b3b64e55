"""What a rank can see of its launch on this host: its launcher, and the other ranks' processes.

A rank that waits for others, or trains on alone, cannot tell from the network whether the rest of
the job still exists. The process table can, for this host.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pipeline.distributed.rendezvous import RankInfo, rank_variables, ranks_per_node, rendezvous

_POLL_S = 1.0
_START_S = 60.0  # by then a rank of the same host has at least started
# What the ranks of one job have in common; a variable that neither has counts as equal.
_OF_THE_JOB = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
)
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_REFUSALS = 5


class Launch:
    """Watches the launcher and the other ranks of this host, in a thread of its own.

    torchrun and srun stay for as long as their ranks run, so a rank that outlives them ends itself.
    Of another parent, say a shell script that started the ranks and need not wait for them, that
    is asked only until the ranks have met.

    Args:
        info: this rank's position.
        environment: the launcher's variables.
        orphaned: called once, from the thread, when the launcher is gone; it ends the process.

    Raises:
        ConfigError: torchrun's variables name no port.

    Attributes:
        info: this rank's position.
    """

    def __init__(
        self, info: RankInfo, environment: Mapping[str, str], orphaned: Callable[[str], None]
    ) -> None:
        self.info = info
        self._orphaned = orphaned
        self._job = {name: environment.get(name) for name in _OF_THE_JOB}
        self._variables = rank_variables(environment)
        self._of_one_node = ranks_per_node(environment) == info.world_size
        self._stays = "TORCHELASTIC_RUN_ID" in environment or "SLURM_STEP_ID" in environment
        self._parent = os.getppid()
        self._agent: tuple[str, int] | None = None
        if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            address, port = rendezvous(environment)
            self._agent = (address, int(port))
        self._refused = 0
        self._started_s = time.monotonic()
        self._met = threading.Event()
        self._seen: dict[int, set[int]] = {}
        self._missed: dict[int, int] = {}
        self._alive: set[int] = set()
        self._looks = 0
        if info.world_size > 1:
            threading.Thread(target=self._watch, daemon=True, name="launch").start()

    @property
    def is_of_one_host(self) -> bool:
        """Whether every rank of the job is a process of this host."""
        return self._job["MASTER_ADDR"] in _LOOPBACK or self._of_one_node

    def met(self) -> None:
        """All ranks have met: the watchdog looks after them from here on."""
        self._met.set()

    def ended(self) -> str | None:
        """Which rank had a process on this host that is gone, in words; None if none has."""
        for rank, missed in list(self._missed.items()):
            if missed >= 2:  # twice: between two reads it may just replace itself (exec)
                pids = ", ".join(map(str, sorted(self._seen[rank])))
                return f"{self._names(rank, pids)} ended before all ranks had joined the job"
        return None

    def is_not_here(self, rank: int) -> bool:
        """Whether a rank of a job of one host has no process here, and so has ended or will come.

        What came and went before this rank looked was never seen.
        """
        return self.is_of_one_host and self._looks >= 2 and rank not in self._alive

    def never_here(self, missing: Sequence[int]) -> str | None:
        """Which of the missing ranks of a job of one host has no process here after a minute."""
        waited_s = time.monotonic() - self._started_s
        if not self.is_of_one_host or waited_s < _START_S:
            return None
        absent = [rank for rank in missing if rank not in self._seen]
        return f"{self._names(absent[0])} has not started in {waited_s:.0f} s" if absent else None

    def _names(self, rank: int, pids: str = "") -> str:
        process = f"process {pids} on " if pids else "on "
        return f"rank {rank}/{self.info.world_size} ({process}{socket.gethostname()})"

    def _watch(self) -> None:
        while True:
            if not self._met.is_set():
                self._look_for_ranks()
            elif not self._stays:
                return
            host = socket.gethostname()
            if os.getppid() != self._parent:
                self._orphaned(f"the launcher (process {self._parent} on {host}) is gone")
                return
            if self._agent_is_gone():
                self._orphaned(f"the launcher is gone: torchrun's store for {host} is closed")
                return
            time.sleep(_POLL_S)

    def _agent_is_gone(self) -> bool:
        """Whether torchrun ended before this process looked at who its parent is.

        torchrun opens the store where its ranks meet before it starts them.
        """
        if self._agent is None or self._met.is_set():
            return False
        try:
            socket.create_connection(self._agent, timeout=_POLL_S).close()
            self._agent = None  # from here on the parent is watched
        except ConnectionRefusedError:
            self._refused += 1
        except OSError:
            pass  # a network that is slow, or a name that is not known yet
        return self._refused >= _REFUSALS

    def _look_for_ranks(self) -> None:
        """Note which ranks of this job have a process here."""
        alive: dict[int, set[int]] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            rank = self._rank_of(folder)
            if rank is not None and rank != self.info.rank:
                alive.setdefault(rank, set()).add(int(folder.name))
        self._alive = set(alive)
        self._looks += 1
        for rank, pids in alive.items():
            self._seen[rank] = pids
        self._missed = {
            rank: 0 if rank in alive else self._missed.get(rank, 0) + 1 for rank in self._seen
        }

    def _rank_of(self, folder: Path) -> int | None:
        """The rank whose process this is; None for a process of anything else."""
        try:
            text = (folder / "environ").read_bytes().decode(errors="replace")
        except OSError:  # ended meanwhile, or another user's
            return None
        pairs = dict(pair.partition("=")[::2] for pair in text.split("\0"))
        rank_name, size_name = self._variables
        rank = pairs.get(rank_name, "")
        same_job = all(pairs.get(name) == value for name, value in self._job.items())
        same_size = pairs.get(size_name) == str(self.info.world_size)
        return int(rank) if same_job and same_size and rank.isdecimal() else None
