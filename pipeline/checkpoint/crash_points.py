"""A testing aid: points of a save at which a process ends itself as a power cut would end it.

    HEADWAY_CRASH_AT=POINT[:RANK][@STEP]    e.g. manifest-half-written, weights-half-written:1@6

With the variable set, the process of that rank (any that comes there, when none is given) sends
itself SIGKILL when it reaches the point in the save of that step (of any, when none is given).
Unset, a point costs one look-up of the variable, some fifty times per save.
"""

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from pathlib import Path

VARIABLE = "HEADWAY_CRASH_AT"
# In the order in which a save passes them. Those of the second group are rank 0's alone, those of
# the third too, but only a save that has something to delete passes them.
EVERY_RANK_POINTS = (
    "before-snapshot",
    "after-snapshot",
    "weights-half-written",
    "weights-before-sync",
    "weights-before-check",
    "weights-checked",
    "before-agreement",
    "after-agreement",
    "after-commit",
)
MAIN_RANK_POINTS = (
    "after-folder",
    "state-half-written",
    "before-manifest",
    "manifest-half-written",
    "after-manifest",
    "after-rename",
    "latest-half-written",
    "before-latest-rename",
    "after-latest",
)
DELETION_POINTS = ("before-deletion", "during-deletion", "between-deletions", "after-deletion")
POINTS = EVERY_RANK_POINTS + MAIN_RANK_POINTS + DELETION_POINTS

_FORM = re.compile(r"(?P<point>[a-z-]+)(:(?P<rank>\d+))?(@(?P<step>\d+))?")


_SAVED_STEP: ContextVar[int | None] = ContextVar("saved_step", default=None)


@contextmanager
def saving(step: int) -> Iterator[None]:
    """Within it, crash points are those of the save of this step."""
    token = _SAVED_STEP.set(step)
    try:
        yield
    finally:
        _SAVED_STEP.reset(token)


def thread_of_save(work: Callable[[], None], name: str) -> threading.Thread:
    """A thread, not yet started, whose crash points are those of the save that is going on."""
    context = copy_context()
    return threading.Thread(target=lambda: context.run(work), daemon=True, name=name)


def crash_point(point: str, *, halve: Path | None = None) -> None:
    """End this process when a test asked for it here; else nothing.

    Args:
        point: one of `POINTS`.
        halve: a file that has just been written, and is cut to its half before the end: what a
            process leaves that was killed while it wrote.
    """
    asked = os.environ.get(VARIABLE)
    if asked is None:
        return
    import torch.distributed as dist  # late: whoever only looks at checkpoints needs no torch

    assert point in POINTS, f"{point} is not a known point"
    found = _FORM.fullmatch(asked)
    if found is None or found["point"] not in POINTS:
        raise ValueError(f"{VARIABLE}={asked!r} must be POINT[:RANK][@STEP], POINT of {POINTS}")
    here = found["point"] == point
    rank = dist.get_rank() if dist.is_initialized() else 0
    here &= found["rank"] in (None, str(rank))
    here &= found["step"] in (None, str(_SAVED_STEP.get()))
    if here:
        if halve is not None:
            os.truncate(halve, halve.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
