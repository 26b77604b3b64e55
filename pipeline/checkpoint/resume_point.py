"""Where a run goes on from: the checkpoint, read once and checked against the run."""

import logging
from pathlib import Path
from typing import NamedTuple

from model.errors import CheckpointError
from pipeline.checkpoint.file_names import WEIGHTS
from pipeline.checkpoint.folder import CheckpointFolder, read_config
from pipeline.checkpoint.train_state import (
    TrainState,
    layout_changes,
    read_state,
    resume_problems,
)
from pipeline.config.changes import config_changes, table
from pipeline.config.run_config import RunConfig

logger = logging.getLogger(__name__)


class ResumePoint(NamedTuple):
    """A checkpoint that the run can go on from.

    Attributes:
        path: its folder.
        state: progress when it was saved.
        config: the run as it was then.
    """

    path: Path
    state: TrainState
    config: RunConfig

    @property
    def weights(self) -> Path:
        """Where its tensors are."""
        return self.path / WEIGHTS

    def state_now(self, fresh: TrainState) -> TrainState:
        """The saved progress, with the data and the layout of this run.

        A checkpoint of an earlier version has no summary of its data; the fingerprints agree.
        """
        return self.state.model_copy(update={"data": fresh.data, "layout": fresh.layout})


def find_resume_point(
    checkpoints: CheckpointFolder, resume: str, config: RunConfig, fresh: TrainState
) -> ResumePoint | None:
    """The checkpoint to go on from; None for a new run. A collective.

    Args:
        checkpoints: of the run.
        resume: `auto`, `none`, or the path of a checkpoint or run.
        config: this run.
        fresh: the state that a new run would begin with.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or not of this run.
    """
    path = None if resume == "none" else checkpoints.find(resume, report=logger.warning)
    if path is None:
        # With auto these are of a run that ended before its first save.
        moved = checkpoints.set_aside(config.run.dir)
        if moved is not None:
            logger.info("earlier files of %s moved to %s", config.run.dir, moved)
        return None
    point = ResumePoint(path, read_state(path), read_config(path))
    problems = resume_problems(point.state, fresh) + model_problems(point.config, config)
    problems += _review_problems(point, config, fresh)
    if problems:
        raise CheckpointError(
            f"{path} does not fit this run ({'; '.join(problems)}); start with the saved values, "
            "or with --resume none to begin anew"
        )
    if config.steps < point.state.step:
        raise CheckpointError(
            f"train.steps={config.steps} is below step {point.state.step}, which {path} has "
            f"reached; set train.steps to at least {point.state.step}, or resume from an earlier "
            "checkpoint with --resume PATH"
        )
    _report_changes(point, config, fresh)
    return point


def _review_problems(point: ResumePoint, config: RunConfig, fresh: TrainState) -> list[str]:
    """What would make other passes or steps of a run that goes over its data in phases."""
    before, now = point.config.data.review, config.data.review
    if before is None and now is None:
        return []
    if before is None or now is None:
        have, has = ("no ", "") if before is None else ("", "no ")
        return [f"data.review: saved with {have}phases, and this run has {has}phases"]
    if keys := [key for key in type(now).model_fields if getattr(before, key) != getattr(now, key)]:
        return [f"data.review: saved with other {' and '.join(keys)} than this run has"]
    was = point.config.global_batch_size(point.state.layout.data)
    size = config.global_batch_size(fresh.layout.data)
    if was == size:
        return []
    return [
        f"a step was {was} samples and is {size}, and data.review counts in steps: set "
        f"batch.micro_size or batch.accumulation so that it is {was} again"
    ]


def _report_changes(point: ResumePoint, config: RunConfig, fresh: TrainState) -> None:
    """Say in what the run goes on differently."""
    if differing := config_changes(point.config, config):
        logger.info("changed since the checkpoint:\n%s", "\n".join(table(differing)))
    if changes := layout_changes(point.state.layout, fresh.layout):
        logger.info("resuming in another layout than saved: %s", ", ".join(changes))
    before = point.config.global_batch_size(point.state.layout.data)
    now = config.global_batch_size(fresh.layout.data)
    if before != now:
        logger.warning(
            "a step was %d samples and is %d from now on: the data goes on where it was, but "
            "schedule, skipped batches and weight changes count steps",
            before,
            now,
        )
    masked, masks = point.config.data.document_mask, config.data.document_mask
    if masked != masks:
        logger.warning(
            "data.document_mask was %s up to here and is %s from here on",
            str(masked).lower(),
            str(masks).lower(),
        )


def model_problems(saved: RunConfig, current: RunConfig) -> list[str]:
    """Sizes in which a saved model differs from this run's, one line each."""
    before, now = saved.model.model_dump(), current.model.model_dump()
    if before["memory"] and now["memory"]:  # then the key that differs is told, not all of them
        for model in (before, now):
            model |= {f"memory.{key}": value for key, value in model.pop("memory").items()}
    fixed = [key for key in before if key not in ("head_weights", "init_std", "embedding_init_std")]
    return [
        f"model.{key}: saved with {before[key]}, this run has {now[key]}"
        for key in fixed
        if before[key] != now[key]
    ] + _freeze_problems(saved, current)


def _freeze_problems(saved: RunConfig, current: RunConfig) -> list[str]:
    before, now = saved.train.freeze, current.train.freeze
    if before == now:
        return []
    return [
        f"train.freeze: saved with {before}, this run has {now}, and the optimizer's states would "
        "not fit; export the checkpoint and begin a run with train.init_from"
    ]
