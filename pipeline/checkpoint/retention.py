"""Which checkpoints stay: the newest, every M-th, the best; and how the others go.

A checkpoint goes only after a newer one was committed, which happens only after each of its files
was read back from the disk. It loses its name first, so that what a kill leaves of it never counts.
Only what saves wrote is deleted: links, and files of other names, stay.
"""

import logging
import math
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from foundation.json_text import read_json
from pipeline.checkpoint.crash_points import crash_point, thread_of_save
from pipeline.checkpoint.file_names import (
    FOLDERS,
    PARTIAL,
    STATE_NAME,
    committed,
    is_partial,
    is_saved,
    step_of,
)
from pipeline.checkpoint.files import misnaming, other_version, size_problems
from pipeline.config.sections import CheckpointSection

logger = logging.getLogger(__name__)


class Candidate(NamedTuple):
    """A checkpoint that may go.

    Attributes:
        step: its step.
        eval_loss: validation loss of its weights; None when they were not validated.
    """

    step: int
    eval_loss: float | None


def superfluous(found: Sequence[Candidate], options: CheckpointSection) -> list[int]:
    """Steps whose checkpoints go.

    Args:
        found: whole checkpoints.
        options: the policy.

    Example: keep=2, keep_every=1000, keep_best=1 and steps 500 (loss 3.1), 1000 (3.2), 1500 (3.0),
    2000 (3.1), 2500 (3.3), 3000 (3.2): 2500 and 3000 are the newest, 1000, 2000 and 3000 are kept
    for good, 1500 is the best, and 500 goes.
    """
    newest = sorted(found, key=lambda one: one.step)[-options.keep :]
    stays = {one.step for one in newest}
    if options.keep_every:
        stays |= {one.step for one in found if one.step % options.keep_every == 0}
    judged = [
        (one.eval_loss, one.step)
        for one in found
        if one.eval_loss is not None and math.isfinite(one.eval_loss)
    ]
    # Of two as good as each other the later one has seen more data.
    judged.sort(key=lambda pair: (pair[0], -pair[1]))
    stays |= {step for _, step in judged[: options.keep_best]}
    return sorted(one.step for one in found if one.step not in stays)


class Retention:
    """Deletes the superfluous checkpoints of a folder, in a thread of its own.

    Args:
        directory: the checkpoints' folder.
        options: the policy.
    """

    def __init__(self, directory: Path, options: CheckpointSection) -> None:
        self._directory = directory
        self._options = options
        self._thread: threading.Thread | None = None

    def apply(self, newest: Path) -> None:
        """Delete what is too much, now that `newest` is committed.

        Only what is older than `newest` may go. Older ones that have lost files, or parts of
        them, do not count among those to keep; they go when they are older than all of these.
        Links to checkpoints elsewhere, those renamed to another step and those of another version
        neither count nor go.
        """
        self.wait()
        try:
            doomed = self._take_names(newest)
        except OSError as error:
            logger.warning("old checkpoints in %s cannot be deleted: %s", self._directory, error)
            return
        if doomed:
            self._thread = thread_of_save(lambda: _delete(doomed), "retention")
            self._thread.start()

    def _take_names(self, newest: Path) -> list[Path]:
        """Rename what goes, so that it is not a checkpoint any more; the new paths."""
        last = step_of(newest) or 0
        older = [
            path
            for path in committed(self._directory)
            if (step_of(path) or 0) <= last
            and (
                path == newest or not (path.is_symlink() or misnaming(path) or other_version(path))
            )
        ]
        whole = [path for path in older if path == newest or not size_problems(path)]
        found = [Candidate(step_of(path) or 0, eval_loss(path)) for path in whole]
        going = superfluous(found, self._options)
        first_kept = min({one.step for one in found} - set(going))
        going += [
            step
            for path in older
            if path not in whole and (step := step_of(path) or 0) < first_kept
        ]
        return [
            path.rename(path.with_name(path.name + PARTIAL))
            for path in older
            if step_of(path) in going
        ]

    def clear_partial(self) -> None:
        """Delete what killed or failed saves left, as far as that is possible."""
        self.wait()
        for path in self._directory.glob(f"step_*{PARTIAL}"):
            if is_partial(path):
                clear(path)

    def wait(self) -> None:
        """Wait for a deletion that is going on."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def eval_loss(checkpoint: Path) -> float | None:
    """Validation loss that a checkpoint says its weights have, if any."""
    try:
        value = read_json(checkpoint / STATE_NAME).get("eval_loss")
    except (OSError, ValueError, AttributeError):
        return None
    return float(value) if isinstance(value, int | float) else None


def clear(folder: Path) -> None:
    """Delete what saves wrote into a folder, and the folder when it is empty then.

    Errors are logged, as is what no save wrote: that stays.
    """
    try:
        if left := _delete_saved(folder):
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            logger.warning("%s stays: no save wrote %s%s in it", folder, left[0], more)
    except OSError as error:
        logger.warning(
            "%s cannot be deleted (%s); it is not a checkpoint any more: delete it by hand",
            folder,
            error.strerror,
        )


def _delete_saved(folder: Path) -> list[str]:
    """Delete what saves wrote; what stays, by its name below the folder."""
    if folder.is_symlink() or not folder.is_dir():
        return [folder.name] if os.path.lexists(folder) else []
    left = []
    for path in sorted(folder.iterdir()):
        if path.name in FOLDERS and path.is_dir() and not path.is_symlink():
            kept = [name for inner in sorted(path.iterdir()) for name in _delete_one(folder, inner)]
            left += kept
            if not kept:
                path.rmdir()
        else:
            left += _delete_one(folder, path)
    if not left:
        folder.rmdir()
    return left


def _delete_one(folder: Path, path: Path) -> list[str]:
    """Delete a file that a save wrote; its name when it is none."""
    name = path.relative_to(folder).as_posix()
    if path.is_symlink() or not path.is_file() or not is_saved(name):
        return [name]
    path.unlink()
    crash_point("during-deletion")
    return []


def _delete(folders: Sequence[Path]) -> None:
    crash_point("before-deletion")
    for number, folder in enumerate(folders):
        if number:
            crash_point("between-deletions")
        clear(folder)
    crash_point("after-deletion")
