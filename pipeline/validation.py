"""The validation samples of a run, dealt to the ranks; the same ones in every layout."""

from collections.abc import Iterator

import torch

from data_prep.loader import Batch, ShardSet, TokenLoader
from model.loss import IGNORED
from pipeline.config import RunConfig


class ValidationSamples:
    """The first `eval.samples` windows of the validation split, in stream order.

    Args:
        config: the run.
        data_rank: this rank's place among those that hold different data.
        data_size: how many such ranks there are.

    Raises:
        DataError: the split is missing, damaged, or smaller than one window per rank.
    """

    def __init__(self, config: RunConfig, *, data_rank: int, data_size: int) -> None:
        shards = ShardSet.open(config.data.shards, config.data.eval_split)
        windows = (shards.num_tokens - config.model.future_tokens) // config.data.sequence_length
        self.num_samples = min(config.eval.samples, max(windows, 1))
        micro_size = max(1, min(config.batch.micro_size, self.num_samples // data_size))
        self._rank = data_rank
        self._loader = TokenLoader(
            shards,
            sequence_length=config.data.sequence_length,
            future_tokens=config.model.future_tokens,
            seed=config.run.seed,
            micro_batch_size=micro_size,
            accumulation=1,
            data_parallel_rank=data_rank,
            data_parallel_size=data_size,
            shuffle=False,
        )

    def __iter__(self) -> Iterator[Batch]:
        """This rank's batches; all ranks get equally many, the last ones padded without labels."""
        loader = self._loader
        for first in range(0, self.num_samples, loader.global_batch_size):
            (batch,) = loader.step_batches(first)
            rows = torch.arange(loader.micro_batch_size) + loader.micro_batch_size * self._rank
            padding = (first + rows) >= self.num_samples
            labels = batch.labels.masked_fill(padding[None, :, None], IGNORED)
            yield batch._replace(labels=labels)
