"""Run a command and measure it with all its processes: time, CPU and memory."""

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import psutil

SAMPLE_S = 0.1


class Usage(NamedTuple):
    """What one run of a command took.

    Attributes:
        wall_s: From start to end, imports included.
        cpu_s: User and system time of all its processes.
        tree_bytes: Most memory of all processes together; shared pages are counted once (PSS).
        process_bytes: Most memory of one process, shared pages included.
    """

    wall_s: float
    cpu_s: float
    tree_bytes: int
    process_bytes: int


def measure(command: Sequence[str], environment: Mapping[str, str]) -> Usage:
    """Run a command to its end.

    Raises:
        RuntimeError: It failed; with the end of what it said.
    """
    before = os.times()
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    tree_bytes = process_bytes = 0
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        proportional, largest = _memory(watched)
        tree_bytes, process_bytes = max(tree_bytes, proportional), max(process_bytes, largest)
        time.sleep(SAMPLE_S)
    wall = time.perf_counter() - started
    after = os.times()
    assert process.stdout is not None, "it was piped"
    said = process.stdout.read()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{said[-2000:]}")
    cpu = after.children_user + after.children_system
    cpu -= before.children_user + before.children_system
    return Usage(wall, cpu, tree_bytes, process_bytes)


def _memory(process: psutil.Process) -> tuple[int, int]:
    """PSS of a process tree, and the largest resident set in it."""
    proportional = largest = 0
    try:
        for member in (process, *process.children(recursive=True)):
            full = member.memory_full_info()
            proportional += full.pss
            largest = max(largest, full.rss)
    except psutil.Error:
        return proportional, largest
    return proportional, largest
