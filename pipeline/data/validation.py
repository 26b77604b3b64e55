"""The validation samples of a run, dealt to the ranks; the same ones in every layout."""

from collections.abc import Iterator

import tokenizers
import torch

from data_prep.loading.loader import Batch, BatchLayout, TokenLoader
from data_prep.shards.shard_set import ShardSet
from model.hugging_face.token_bytes import bytes_of_tokens
from model.loss import IGNORED
from pipeline.config.run_config import RunConfig
from pipeline.data.sequence_format import sequence_format


class ValidationSamples:
    """The first `eval.samples` sequences of the validation split, the same in every layout.

    Concatenated sequences come in stream order. Those of whole documents, of which best-fit packing
    has the long ones first, come in an order that depends on nothing but the shards. Several
    sources are mixed by their tokens in this split, whatever the training weights are.

    Args:
        config: the run.
        shards: its validation split.
        data_rank: this rank's index among those that hold different data.
        data_size: how many such ranks there are.

    Attributes:
        token_bytes: `[V]` float64, bytes that each token spells.

    Raises:
        DataError: the split is smaller than one sequence per rank, or the tokenizer is damaged.
    """

    def __init__(
        self, config: RunConfig, shards: ShardSet, *, data_rank: int, data_size: int
    ) -> None:
        self._loader = TokenLoader(
            shards,
            sequence_format(config),
            BatchLayout(micro_size=1, data_rank=data_rank, data_size=data_size),
            seed=0,
            shuffle=config.data.packing != "concat",
        )
        tokenizer = tokenizers.Tokenizer.from_buffer(shards.open_tokenizer().content)
        self.token_bytes = torch.tensor(
            bytes_of_tokens(tokenizer, config.model.vocab_size), dtype=torch.float64
        )
        self.num_samples = min(config.eval.samples, self._loader.num_samples)
        self._rank, self._size = data_rank, data_size
        self._micro_size = max(1, min(config.batch.micro_size, self.num_samples // data_size))

    def __iter__(self) -> Iterator[Batch]:
        """This rank's batches; all ranks get equally many, the last ones padded without labels."""
        count = self._micro_size
        for first in range(0, self.num_samples, count * self._size):
            start = first + count * self._rank
            batch = self._loader.read(start, count)
            padding = start + torch.arange(count) >= self.num_samples
            labels = batch.labels.masked_fill(padding[None, :, None], IGNORED)
            yield batch._replace(labels=labels)
