"""A testing aid: points of a save at which a process ends itself as a power cut would end it.

    HEADWAY_CRASH_AT=POINT[:RANK][@STEP]    e.g. manifest-half-written, weights-half-written:1@6

With the variable set, the process of that rank (any that comes there, when none is given) sends
itself SIGKILL when it reaches the point in the save of that step (of any, when none is given).
Unset, a point costs one look-up of the variable, some fifty times per save.
"""

import os
import re
import signal

import torch.distributed as dist

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


def crash_point(point: str, step: int) -> None:
    """End this process when a test asked for it here; else nothing.

    Args:
        point: one of `POINTS`.
        step: the step that is being saved.
    """
    asked = os.environ.get(VARIABLE)
    if asked is None:
        return
    assert point in POINTS, f"{point} is not a known point"
    found = _FORM.fullmatch(asked)
    if found is None or found["point"] not in POINTS:
        raise ValueError(f"{VARIABLE}={asked!r} must be POINT[:RANK][@STEP], POINT of {POINTS}")
    here = found["point"] == point
    rank = dist.get_rank() if dist.is_initialized() else 0
    here &= found["rank"] in (None, str(rank))
    here &= found["step"] in (None, str(step))
    if here:
        os.kill(os.getpid(), signal.SIGKILL)
