"""What can be known about a run before it starts: checked once, where an error is one line."""

import os
from pathlib import Path

from foundation.shown_text import reason
from model.errors import CheckpointError, ConfigError
from pipeline.checkpoint.file_names import FOLDER
from pipeline.checkpoint.files import newest_checkpoint
from pipeline.checkpoint.folder import read_config
from pipeline.checkpoint.resume_point import model_problems
from pipeline.config.run_config import RunConfig, data_parallel_size
from pipeline.data.samples import open_shards, training_samples
from pipeline.review.schedule import ReviewSchedule, with_steps


def check_run(config: RunConfig, world_size: int | None, resume: str) -> None:
    """Refuse a run that could not train, without starting it.

    Args:
        config: the run.
        world_size: number of its ranks; None = not known yet.
        resume: as `pipeline.train --resume` has it.

    Raises:
        ConfigError: the number of ranks or the folder does not fit.
        DataError: the shards are missing, damaged or too few.
        CheckpointError: the run would not go on from its newest checkpoint.
    """
    shards = open_shards(config)
    if world_size is not None:
        data_size = data_parallel_size(config, world_size)
        loader = training_samples(config, shards, data_rank=0, data_size=data_size)
        if config.data.review is not None:
            schedule = ReviewSchedule(config.data.review, loader.num_samples)
            with_steps(config, schedule, loader.global_batch_size)
    _check_folder(config.run.dir)
    if resume == "auto":
        _check_newest(config)


def _check_folder(folder: Path) -> None:
    """Make the run's folder, as the run would."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"run.dir={folder} cannot be made ({reason(error)}); set another run.dir"
        ) from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"run.dir={folder} cannot be written; set another run.dir")


def _check_newest(config: RunConfig) -> None:
    newest = newest_checkpoint(config.run.dir / FOLDER)
    if newest is None:
        return
    if problems := model_problems(read_config(newest), config):
        raise CheckpointError(
            f"{newest} does not fit this run ({'; '.join(problems)}); start with the saved values, "
            "or with --resume none to begin anew"
        )
