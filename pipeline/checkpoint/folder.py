"""A run's checkpoints: written aside, agreed by all ranks, listed, renamed; `latest` last.

A folder that lacks its manifest, or whose files differ from it, is never taken for a checkpoint.
How the ranks write is the business of `saving`, what stays that of `retention`.
"""

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from foundation.bounded_files import check_regular
from foundation.durable_files import sync_folder, write_synced
from foundation.shown_text import reason
from model.errors import CheckpointError
from pipeline.checkpoint.crash_points import crash_point
from pipeline.checkpoint.file_names import (
    FOLDER,
    LATEST,
    PARTIAL,
    RESOLVED_CONFIG_NAME,
    REVIEW,
    WEIGHTS,
    committed,
    step_folder,
    step_of,
)
from pipeline.checkpoint.files import (
    Entries,
    checkpoint_path,
    content_problems,
    newest_checkpoint,
    other_version,
    read_manifest,
    size_problems,
    verify,
    write_manifest,
)
from pipeline.checkpoint.retention import Retention, clear
from pipeline.config.run_config import RunConfig, load_config
from pipeline.config.sections import CheckpointSection
from pipeline.distributed.agreement import from_all, from_main, rank_and_world

logger = logging.getLogger(__name__)

_NUMBER = re.compile("[0-9]{1,18}")
_RUN_FILES = (FOLDER, REVIEW, "metrics.jsonl", "tensorboard", "wandb_id", RESOLVED_CONFIG_NAME)


class CheckpointFolder:
    """The checkpoints of one run, on a file system that all ranks share.

    Args:
        run_dir: the run's folder.
        options: which of them to keep.
    """

    def __init__(self, run_dir: Path, options: CheckpointSection) -> None:
        self.directory = run_dir / FOLDER
        self._retention = Retention(self.directory, options)
        self._on_error = options.on_error
        self._was_made = False

    def prepare(self, step: int) -> Path:
        """An empty folder to write a step's files into; rank 0 makes it.

        What killed or failed saves left is deleted first, so that it never fills the disk.

        Raises:
            OSError: it cannot be made.
        """
        if self._was_made and not self.directory.exists():
            loss = f"{self.directory} was deleted while the run went on, with its checkpoints"
            if self._on_error == "stop":
                raise OSError(loss)
            logger.error("%s; this save makes it again", loss)
        self._retention.clear_partial()
        partial = self._partial(step)
        for path in (partial, partial / WEIGHTS):
            if path.is_symlink() or (path.exists() and path != partial):
                raise OSError(f"{path} is in the way, and no save made it; move it elsewhere")
        (partial / WEIGHTS).mkdir(parents=True)
        return partial

    def commit(
        self,
        step: int,
        entries: Entries,
        missing: Callable[[Path], list[str]] = lambda _weights: [],
    ) -> Path:
        """Make a checkpoint of what all ranks have written; rank 0 does it.

        Args:
            step: its step.
            entries: every file, as its writer knows it; all are on the disk.
            missing: what the tensor files in a folder lack of the model, a line each.

        Raises:
            OSError: it failed; there is no new checkpoint, or `latest` does not name it.
        """
        final, partial = step_folder(self.directory, step), self._partial(step)
        crash_point("before-manifest")
        write_manifest(partial, entries)
        if problems := size_problems(partial):
            raise OSError(f"not all ranks see the same files: {'; '.join(problems[:3])}")
        if problems := missing(partial / WEIGHTS):
            raise OSError(f"the files are not the whole model: {'; '.join(problems[:3])}")
        sync_folder(partial / WEIGHTS)
        sync_folder(partial)
        crash_point("after-manifest")
        if _is_same(final, entries):  # this run saved the step before, and could not finish
            clear(partial)
        else:
            if os.path.lexists(final):
                final.rename(_aside(final))
            partial.rename(final)
        for folder in (self.directory, self.directory.parent, self.directory.parent.parent):
            sync_folder(folder)  # the new name, and with the first save those of its folders
        crash_point("after-rename")
        self._point_latest_at(final)
        crash_point("after-latest")
        self._retention.apply(final)
        return final

    def discard(self, step: int) -> str:
        """Delete what a failed save has written; rank 0 does it.

        Returns:
            What is left: room on the disk, and the newest checkpoint.
        """
        clear(self._partial(step))
        try:
            newest = newest_checkpoint(self.directory)
            free_gib = _free_gib(self.directory)
        except OSError as error:
            return f"({self.directory} cannot be read: {error})"
        name = f"the newest checkpoint is {newest.name}" if newest else "there is no checkpoint yet"
        return f"({free_gib:.2f} GiB free there); {name}"

    def make(self) -> None:
        """Make the folder, so that one that is missing later was there once."""
        with contextlib.suppress(OSError):  # the first save says what is in the way
            self.directory.mkdir(parents=True, exist_ok=True)
            self._was_made = True

    def _is_unused(self) -> bool:
        """Whether nothing was ever saved here; a link to nothing may name something."""
        if not self.directory.exists():
            return not self.directory.is_symlink()
        # What is no folder is in the way of the first save, which says so.
        return not self.directory.is_dir() or not any(self.directory.iterdir())

    def finish_deletions(self) -> None:
        """Wait for deletions that are going on."""
        self._retention.wait()

    def _partial(self, step: int) -> Path:
        final = step_folder(self.directory, step)
        return final.with_name(final.name + PARTIAL)

    def _point_latest_at(self, checkpoint: Path) -> None:
        aside = self.directory / (LATEST + PARTIAL)
        write_synced(aside, (checkpoint.name + "\n").encode())
        crash_point("latest-half-written", halve=aside)
        crash_point("before-latest-rename")
        aside.replace(self.directory / LATEST)
        sync_folder(self.directory)

    def find(self, resume: str, report: Callable[[str], None]) -> Path | None:
        """The checkpoint to resume from, verified by all ranks together.

        Args:
            resume: `auto` (newest whole one, None without any), or the path of a checkpoint, of a
                run or of its checkpoints folder.
            report: told of each damaged checkpoint that `auto` passes over.

        Raises:
            CheckpointError: the named checkpoint is missing or damaged.
        """
        if resume != "auto":
            chosen = from_main(lambda: checkpoint_path(Path(resume)), CheckpointError)
            _check_version(chosen)
            if problems := verify_together(chosen):
                raise CheckpointError(
                    f"{chosen} is damaged: {'; '.join(problems[:3])}; use another checkpoint, or "
                    "--resume auto for the newest whole one"
                )
            return chosen
        found = from_main(self._found, CheckpointError)
        for checkpoint in reversed(found):
            _check_version(checkpoint)
            problems = verify_together(checkpoint)
            if not problems:
                return checkpoint
            report(f"passing over {checkpoint}: {'; '.join(problems[:3])}")
        if found:
            raise CheckpointError(
                f"all {len(found)} checkpoints in {self.directory} are damaged; check the storage, "
                "or begin anew with --resume none (they are then moved aside)"
            )
        return None

    def _found(self) -> list[Path]:
        """All checkpoints; none only when the run has made none.

        Raises:
            CheckpointError: the run has made some, and they are gone.
        """
        found = committed(self.directory)
        anew = "or begin anew with --resume none (what is there then moves to previous_N)"
        if self.directory.is_symlink() and not self.directory.exists():
            raise CheckpointError(
                f"{self.directory} is a link to {self.directory.readlink()}, which does not exist; "
                f"bring that folder back (is the file system mounted?), {anew}"
            )
        if found:
            return found
        metrics, latest = self.directory.parent / "metrics.jsonl", self.directory / LATEST
        if latest.is_file():
            with latest.open("rb") as file:
                named = file.read(40).decode(errors="replace").strip()
            raise CheckpointError(
                f"{latest} names {named!r}, but {self.directory} holds no checkpoint; bring it "
                f"back, {anew}"
            )
        if not self.directory.exists() and metrics.exists() and metrics.stat().st_size:
            raise CheckpointError(
                f"{metrics} is of a run that has begun, but its folder {self.directory} is "
                f"missing; bring it back, {anew}"
            )
        return found

    def set_aside_after(self, step: int) -> None:
        """Take checkpoints past `step` out of the way: this run goes on from there another way.

        A collective: rank 0 moves, all ranks wait.
        """

        def move() -> None:
            steps = committed(self.directory)
            newer = [path for path in steps if (step_of(path) or 0) > step]
            older = steps[: len(steps) - len(newer)]
            if older and newest_checkpoint(self.directory) != older[-1]:
                self._point_latest_at(older[-1])  # first: it must never dangle
            for path in newer:
                path.rename(_aside(path))

        try:
            from_main(move, OSError)
        except OSError as error:
            raise CheckpointError(
                f"checkpoints past step {step} in {self.directory} cannot be set aside ({error}); "
                "this run would collide with them: make the folder writable"
            ) from error

    def set_aside(self, run_dir: Path) -> Path | None:
        """Move an earlier run's files out of the way of a new run that starts from nothing.

        Returns:
            Where they went; None when there were none. Rank 0 moves, all ranks wait.
        """

        def move() -> Path | None:
            names = [name for name in _RUN_FILES if os.path.lexists(run_dir / name)]
            metrics = run_dir / "metrics.jsonl"
            if self._is_unused() and not (metrics.exists() and metrics.stat().st_size):
                return None
            numbers = [path.name.removeprefix("previous_") for path in run_dir.glob("previous_*")]
            number = 1 + max((int(text) for text in numbers if _NUMBER.fullmatch(text)), default=0)
            target = run_dir / f"previous_{number}"
            target.mkdir(parents=True)
            for name in names:
                _move(run_dir / name, target / name)
            return target

        try:
            return from_main(move, OSError)
        except OSError as error:
            raise CheckpointError(
                f"the earlier files of {run_dir} cannot be moved aside ({error}); make the folder "
                "writable, or set another run.dir"
            ) from error


def read_config(checkpoint: Path) -> RunConfig:
    """The resolved configuration in a checkpoint; keys that this version lacks are left out.

    Raises:
        CheckpointError: it is missing, or no file.
        ConfigError: it cannot be used.
    """
    path = checkpoint / RESOLVED_CONFIG_NAME
    try:
        check_regular(path)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({reason(error)}); use another checkpoint"
        ) from error
    return load_config(
        path, left_out=lambda key: logger.warning("%s: unknown key %s is left out", path, key)
    )


def _check_version(checkpoint: Path) -> None:
    """Refuse a checkpoint of another version: it is not damaged, and is not to be passed over.

    Raises:
        CheckpointError: with both versions.
    """
    if problem := from_main(lambda: other_version(checkpoint), OSError):
        raise CheckpointError(problem)


def verify_together(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint; every rank reads its share of it and all get all.

    Sizes are rank 0's to see, so that all ranks judge the same files.
    """
    problems = from_main(lambda: size_problems(checkpoint), OSError)
    if problems:
        return problems
    entries = from_main(lambda: read_manifest(checkpoint), CheckpointError)
    rank, world = rank_and_world()
    found = from_all(content_problems(checkpoint, entries, sorted(entries)[rank::world]))
    return [problem for part in found for problem in part]


def _is_same(checkpoint: Path, entries: Entries) -> bool:
    """Whether a committed checkpoint is whole and has exactly these files."""
    return checkpoint.exists() and not verify(checkpoint) and read_manifest(checkpoint) == entries


def _move(path: Path, target: Path) -> None:
    """Move a file or folder; a link goes on naming what it named."""
    if path.is_symlink():
        target.symlink_to(path.parent.resolve() / path.readlink())
        path.unlink()
    else:
        path.rename(target)


def _free_gib(path: Path) -> float:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free / 2**30


def _aside(path: Path) -> Path:
    """A free name for a checkpoint that is not this run's any more."""
    target = path.with_name(f"superseded_{path.name}")
    number = 1
    while os.path.lexists(target):
        number += 1
        target = path.with_name(f"superseded_{path.name}_{number}")
    return target
