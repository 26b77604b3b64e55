"""Sequences of a run as text: those that are hard to the end, and those it forgot most often."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from numpy.typing import NDArray

from data_prep.errors import DataError
from data_prep.loading.loader import BatchLayout, TokenLoader
from data_prep.loading.review_order import ReviewOrder
from data_prep.shards.shard_set import ShardSet
from foundation.json_text import read_json
from model.loss import IGNORED
from pipeline.checkpoint.file_names import RESOLVED_CONFIG_NAME
from pipeline.config.run_config import load_config
from pipeline.data.sequence_format import sequence_format
from pipeline.review.files import INDEX, review_folder
from pipeline.review.schedule import ReviewSchedule


class Example(NamedTuple):
    """A sequence as people read it.

    Attributes:
        number: over all sources.
        source: that it is of.
        losses: of each epoch; None = it was not in it.
        text: its tokens, decoded.
    """

    number: int
    source: str
    losses: list[float | None]
    text: str


def examples_of(
    run_dir: Path, epochs: Sequence[NDArray[np.float32]], numbers: Sequence[int]
) -> list[Example]:
    """Sequences with their text.

    Args:
        run_dir: the run's folder.
        epochs: `[sequences]` losses of each.
        numbers: those wanted.

    Raises:
        ConfigError: the configuration cannot be read.
        DataError: the shards are gone, or others than the run had.
    """
    config = load_config(run_dir / RESOLVED_CONFIG_NAME)
    assert config.data.review is not None
    shards = ShardSet.open(config.data.shards, config.data.train_split)
    loader = TokenLoader(shards, sequence_format(config), BatchLayout(1), seed=config.run.seed)
    if read_json(review_folder(run_dir) / INDEX).get("fingerprint") != loader.fingerprint:
        raise DataError(
            f"{config.data.shards} are other shards than those that {run_dir} was trained on, so "
            "its sequences are not known; put those back there, or give data.shards in its "
            f"{RESOLVED_CONFIG_NAME}"
        )
    schedule = ReviewSchedule(config.data.review, loader.num_samples)
    order = schedule.order(
        list(loader.sequences_by_source.values()), loader.fingerprint, loader.seed
    )
    sources, _ = order.places(np.array(numbers, np.int64))
    loader.follow(_Listed(order, numbers))
    batch = loader.read(0, len(numbers))
    tokenizer = tokenizers.Tokenizer.from_buffer(shards.open_tokenizer().content)
    examples = []
    for row, number in enumerate(numbers):
        targets = np.flatnonzero(batch.labels[0, row] != IGNORED)
        ids = batch.tokens[row, : int(targets.max(initial=-2)) + 2].tolist()
        losses = [float(epoch[number]) for epoch in epochs]
        examples.append(
            Example(
                number,
                shards.sources[sources[row]],
                [None if loss < 0 else loss for loss in losses],
                tokenizer.decode(ids, skip_special_tokens=False),
            )
        )
    return examples


class _Listed:
    """An order of the sequences that are listed, one sample each."""

    def __init__(self, order: ReviewOrder, numbers: Sequence[int]) -> None:
        self._order = order
        self._numbers = np.array(numbers, np.int64)

    def step_end(self, sample: int, batch: int) -> int:
        """The end of a step that begins with a sample."""
        return min(sample + batch, len(self._numbers))

    def locate(self, first_sample: int, count: int) -> tuple[list[int], list[int]]:
        """Source and sequence of a range of samples."""
        return self._order.places(self._numbers[first_sample : first_sample + count])
