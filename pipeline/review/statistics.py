"""Losses of each sequence in each epoch, and the sequences they choose; on rank 0.

One epoch's losses are in memory, 4 bytes a sequence. Those of epochs that are over lie on the disk.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.loading.review_order import Pass, ReviewOrder
from data_prep.loading.selection import KeptSequences
from foundation.durable_files import FileEntry, read_entry, sync_folder
from foundation.shown_text import reason
from model.errors import CheckpointError
from pipeline.checkpoint.file_names import REVIEW
from pipeline.checkpoint.files import Entries
from pipeline.config.review_section import ReviewSection
from pipeline.review.files import (
    kept_name,
    losses_name,
    put_beside,
    read_kept,
    read_losses,
    rescored_name,
    review_folder,
    write_array,
    write_index,
)
from pipeline.review.schedule import ReviewSchedule
from pipeline.review.staleness import without_running_mean

logger = logging.getLogger(__name__)

# Losses are never below 0.
UNVISITED = np.float32(-1.0)
_CHUNK = 1 << 24

Losses = NDArray[np.float32]


class Statistics:
    """What is known of each sequence.

    Args:
        run_dir: the run's folder.
        options: of its review.
        schedule: its passes.
        order: of its samples; told which sequences a phase has.
    """

    def __init__(
        self, run_dir: Path, options: ReviewSection, schedule: ReviewSchedule, order: ReviewOrder
    ) -> None:
        self.folder = review_folder(run_dir)
        self._options = options
        self._schedule = schedule
        self._order = order
        self._going_on: dict[int, Losses] = {}
        self._rescored: dict[int, Losses] = {}
        self._entries: dict[str, FileEntry] = {}

    def record(self, first_sample: int, losses: Losses) -> None:
        """Keep the losses of samples that were trained on, each once.

        Args:
            first_sample: the first of them.
            losses: `[samples]`.

        Raises:
            OSError: an epoch is over, and cannot be written.
        """
        done = 0
        while done < len(losses):
            sample = first_sample + done
            now = self._order.pass_at(sample)
            count = min(now.end - sample, len(losses) - done)
            numbers = self._order.numbers(sample, count)
            array = self._of(now)
            assert bool((array[numbers] == UNVISITED).all()), f"epoch {now.number + 1}: twice"
            array[numbers] = losses[done : done + count]
            done += count
            if sample + count == now.end:
                self._finish(now)

    def _of(self, now: Pass) -> Losses:
        """The losses of an epoch that is going on."""
        if now.number not in self._going_on:
            self._going_on[now.number] = np.full(self._order.total, UNVISITED, np.float32)
        return self._going_on[now.number]

    def _finish(self, now: Pass) -> None:
        """An epoch is over: its losses go to the disk and stay there."""
        array = self._going_on.pop(now.number)
        visited = len(array) - int(np.count_nonzero(array == UNVISITED))
        assert visited == now.size, f"epoch {now.number + 1}: {visited} of {now.size} recorded"
        self._keep_file(losses_name(now.number), array)

    def _keep_file(self, name: str, array: NDArray[Any]) -> None:
        self._entries[name] = write_array(self.folder / name, array)
        self._write_index()

    def record_rescored(self, phase: int, first_sample: int, losses: Losses) -> None:
        """Keep the losses of samples that were read again before a phase's choice.

        Args:
            phase: the phase.
            first_sample: the first of them, in the epoch where they were trained on.
            losses: `[samples]`.
        """
        if phase not in self._rescored:
            self._rescored[phase] = np.full(self._order.total, UNVISITED, np.float32)
        self._rescored[phase][self._order.numbers(first_sample, len(losses))] = losses

    def finish_rescored(self, phase: int) -> None:
        """All were read again: their losses go to the disk and stay there.

        Raises:
            OSError: they cannot be written.
        """
        self._keep_file(rescored_name(phase), self._rescored.pop(phase))

    def select(self, phase: int) -> KeptSequences:
        """The sequences that a phase has, which its file remembers.

        Raises:
            OSError: the file cannot be written or read.
        """
        name = kept_name(phase)
        if name in self._entries:
            total = self._order.total
            return KeptSequences(np.array(read_kept(self.folder / name, total)), total)
        judgement = self._judgement(phase)
        if strange := int(np.count_nonzero(np.isnan(judgement) | (judgement == np.inf))):
            logger.warning("%d losses are not finite and count as the highest", strange)
        kept = KeptSequences.by_loss(judgement, self._schedule.dropped(phase))
        self._keep_file(name, kept.bits)
        return kept

    def _judgement(self, phase: int) -> Losses:
        """What a phase's sequences are ordered by: the mean over the epochs that judge.

        Of those that were read again it is the loss that they had then.
        """
        judges = self._schedule.judges(phase)
        total = np.zeros(self._order.total, np.float32)
        for one in judges:
            losses: Losses = read_losses(self.folder / losses_name(one.number), len(total))
            if self._options.staleness == "subtract_running_mean":
                losses = without_running_mean(
                    losses, one, self._order, self._options.running_mean_sequences
                )
            for start in range(0, len(total), _CHUNK):
                total[start : start + _CHUNK] += losses[start : start + _CHUNK]
        if len(judges) > 1:
            total /= np.float32(len(judges))
        if rescored_name(phase) in self._entries:
            again = read_losses(self.folder / rescored_name(phase), len(total))
            for start in range(0, len(total), _CHUNK):
                part = again[start : start + _CHUNK]
                np.copyto(total[start : start + _CHUNK], part, where=part != UNVISITED)
        return total

    def files(self) -> Callable[[Path], Entries]:
        """What a checkpoint has of it, as it is now; to be called in any thread."""
        complete = dict(self._entries)
        going_on = {losses_name(n): array.copy() for n, array in self._going_on.items()}

        def write(checkpoint: Path) -> Entries:
            folder = checkpoint / REVIEW
            folder.mkdir()
            for name in complete:
                put_beside(self.folder / name, folder / name)
            entries = complete | {n: write_array(folder / n, a) for n, a in going_on.items()}
            sync_folder(folder)
            return {f"{REVIEW}/{name}": entry for name, entry in entries.items()}

        return write

    def restore(self, checkpoint: Path | None, next_sample: int) -> None:
        """Begin with what a checkpoint has; or with nothing.

        Raises:
            CheckpointError: the checkpoint lacks what its position needs; all is as it was then.
            OSError: the run's folder cannot be written.
        """
        complete: set[str] = set()
        for one in self._schedule.passes:
            if one.first_sample >= next_sample or checkpoint is None:
                break
            losses = _from_checkpoint(checkpoint, losses_name(one.number), read_losses, self._order)
            if one.end > next_sample:
                self._going_on[one.number] = np.array(losses)
            else:
                complete.add(losses_name(one.number))
            if one.chosen:
                _from_checkpoint(checkpoint, kept_name(one.phase), read_kept, self._order)
                complete.add(kept_name(one.phase))
            if self._schedule.rescored(one.phase) is not None:
                _from_checkpoint(checkpoint, rescored_name(one.phase), read_losses, self._order)
                complete.add(rescored_name(one.phase))
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("losses_epoch_*", "rescored_phase_*", "kept_phase_*"):
            for path in self.folder.glob(name):
                path.unlink()
        if checkpoint is not None:
            for name in complete:
                put_beside(checkpoint / REVIEW / name, self.folder / name)
                self._entries[name] = read_entry(self.folder / name)
        self._write_index()

    def _write_index(self) -> None:
        """What there is, for people and for reports."""
        schedule = self._schedule
        files = {n: {"bytes": e.size, "xxh3": e.xxh3} for n, e in sorted(self._entries.items())}
        write_index(
            self.folder,
            {
                "version": 1,
                "fingerprint": self._order.fingerprint,
                "sequences": schedule.sequences,
                "phases": [
                    {"name": phase.name, "kept": schedule.sequences - schedule.dropped(number)}
                    for number, phase in enumerate(schedule.phases)
                ],
                "epochs": [
                    {
                        "phase": one.phase + 1,
                        "repetition": one.repetition + 1,
                        "epoch": one.epoch + 1,
                        "sequences": one.size,
                        "first_sample": one.first_sample,
                    }
                    for one in schedule.passes
                ],
                "files": files,
            },
        )


def _from_checkpoint(
    checkpoint: Path, name: str, read: Callable[[Path, int], NDArray[Any]], order: ReviewOrder
) -> NDArray[Any]:
    """An array of a checkpoint, without which a run cannot go on.

    Raises:
        CheckpointError: it is missing, or is none of this run.
    """
    path = checkpoint / REVIEW / name
    if not path.is_file():
        raise CheckpointError(
            f"{checkpoint} has no {REVIEW}/{name}, without which data.review cannot go on; use "
            "another checkpoint"
        )
    try:
        return read(path, order.total)
    except OSError as error:
        raise CheckpointError(
            f"the review of {checkpoint} is damaged ({reason(error)}); use another checkpoint"
        ) from error
