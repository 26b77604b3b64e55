"""Processes of this machine, told from those of other machines and containers."""

import os


def process_space() -> str:
    """Names the set of processes that share this one's numbers: machine and container."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"unknown/{os.getpid()}"


def process_is_gone(pid: int, started: str | None = None) -> bool:
    """Whether a process of this host has ended (a zombie has, though its number still exists).

    Args:
        pid: its number.
        started: what `process_start` said of it; another process may have its number by now.
    """
    try:
        fields = _stat_fields(pid)
    except OSError:
        return True
    return fields[0] == "Z" or (started is not None and fields[_START] != started)


def process_start(pid: int) -> str | None:
    """When a process of this host began, in ticks since the machine did; None when unknown."""
    try:
        return _stat_fields(pid)[_START]
    except OSError:
        return None


_START = 19  # of the fields behind the name: the state is number 0


def _stat_fields(pid: int) -> list[str]:
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
        return file.read().rpartition(")")[2].split()
