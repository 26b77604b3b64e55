"""What a process grows by while something runs, measured in a copy of the process."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path


def grown_mib(warm_up: Callable[[], object], run: Callable[[], object]) -> float:
    """The most that `run` adds to the resident memory of a fork of this process.

    Args:
        warm_up: runs before in the same fork: it touches code and memory that are there anyway.
        run: what is measured.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        warm_up()
        before = _status_mib("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
        run()
        sender.send(_status_mib("VmHWM") - before)

    process = context.Process(target=child)
    process.start()
    sender.close()
    grown = float(receiver.recv())
    process.join()
    return grown


def _status_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))
