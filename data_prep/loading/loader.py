"""Shards to training batches; the order is a pure function and the position is one integer.

Legend: B rows of a micro-batch, S sequence length, n heads (future tokens).
"""

import queue
import threading
from collections.abc import Generator, Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.errors import DataError
from data_prep.loading.mixture import Mixture, MixtureSegment, block_counts
from data_prep.loading.permutation import Permutation
from data_prep.loading.rows import PackingName, cut_rows
from data_prep.shards.shard_set import ShardSet
from data_prep.tokenization.tokenizer import TokenArray

__all__ = ["Batch", "ShardSet", "TokenLoader"]

POLL_S = 0.1
IGNORED = -100
LOCATED_SAMPLES = 1024


class Batch(NamedTuple):
    """One micro-batch of one rank.

    Attributes:
        tokens: `[B, S]` int64.
        labels: `[n, B, S]` int64; labels[k - 1, b, t] is the token t + k of row b, the target of
            head k at t. -100 = no target: padding, and with `documents` a token of another
            document. Example with S = 3, n = 2 and the row [5, 6, 7, 8, 9]: tokens [5, 6, 7],
            labels [6, 7, 8] for head 1 and [7, 8, 9] for head 2; if a document ends with the 7,
            [6, 7, -100] and [7, -100, -100].
        documents: `[B, S]` int32, or None when not asked for; the number of each token's document
            within its row: 0, 1, 2, ... A row that begins inside a document has the rest of that
            document as document 0; padding counts as one more document.
    """

    tokens: Tensor
    labels: Tensor
    documents: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device."""
        documents = self.documents
        return Batch(
            self.tokens.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            None if documents is None else documents.to(device, non_blocking=True),
        )


class _RowBuffer(NamedTuple):
    """Tokens `[B, S + n]`, and a view of each row."""

    tokens: TokenArray
    rows: list[TokenArray]


class TokenLoader:
    """Deals the rows of a shard set to data-parallel ranks.

    Each source of the set is cut into rows (`data_prep.loading.rows`) and has an order and epochs
    of its own: its sample j is row permutation(epoch)(j mod rows) of epoch j // rows. Samples are
    numbered through the whole run; the mixture says which source gives sample s, and which of its
    samples it is. With one source that is s itself. The sample at row b of micro-step a on rank r
    is

        next_sample + a * (micro * ranks) + r * micro + b

    so a step holds the same samples for every split of its global batch.

    Args:
        shards: The split to read.
        sequence_length: S, tokens per row.
        future_tokens: n, targets per position.
        seed: The run's seed.
        micro_batch_size: B, rows per rank and micro-step.
        accumulation: Micro-steps per step.
        data_parallel_rank: This rank.
        data_parallel_size: Number of ranks.
        shuffle: False = rows in stream order.
        packing: How streams are cut into rows.
        documents: Give the number of each token's document, and no target across documents.
        weights: Share of samples of each source; None = by tokens. Sources that are not named get
            none.

    Attributes:
        mixture: Where samples come from; may be replaced before the first batch is read.
        num_samples: Rows of all sources together, one epoch of each.
        padding_share: Share of input positions of those rows without a token.

    Raises:
        DataError: The split is too small for one row or one global batch.
    """

    def __init__(
        self,
        shards: ShardSet,
        *,
        sequence_length: int,
        future_tokens: int,
        seed: int,
        micro_batch_size: int,
        accumulation: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        shuffle: bool = True,
        packing: PackingName = "concat",
        documents: bool = False,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        assert min(sequence_length, future_tokens, micro_batch_size, accumulation) > 0
        assert 0 <= data_parallel_rank < data_parallel_size, (
            data_parallel_rank,
            data_parallel_size,
        )
        self.shards = shards
        self.sequence_length = sequence_length
        self.future_tokens = future_tokens
        self.seed = seed
        self.micro_batch_size = micro_batch_size
        self.accumulation = accumulation
        self.data_parallel_rank = data_parallel_rank
        self.data_parallel_size = data_parallel_size
        self.shuffle = shuffle
        self.documents = documents
        self._streams = [shards.of_source(name) for name in shards.sources]
        self._rows = [
            cut_rows(stream, packing, sequence_length=sequence_length, future_tokens=future_tokens)
            for stream in self._streams
        ]
        self.num_samples = sum(rows.count for rows in self._rows)
        self.padding_share = sum(rows.padding_share * rows.count for rows in self._rows) / (
            self.num_samples or 1
        )
        self.global_batch_size = micro_batch_size * accumulation * data_parallel_size
        self._permutation = lru_cache(maxsize=4 * len(self._rows))(self._make_permutation)
        self._buffers = threading.local()
        self._block = lru_cache(maxsize=4)(self._locate_block)
        self._check_size()
        self.mixture = Mixture(
            shards.sources,
            [
                MixtureSegment(
                    first_sample=0, counts=block_counts(weights or self.weights_by_tokens())
                )
            ],
        )

    @property
    def mixture(self) -> Mixture:
        """Where samples come from."""
        return self._mixture

    @mixture.setter
    def mixture(self, mixture: Mixture) -> None:
        for segment in mixture.segments:
            empty = [name for name, rows in self.rows_by_source.items() if not rows]
            assert not any(segment.share(name) for name in empty), (segment, empty)
        self._mixture = mixture
        self._block.cache_clear()

    @property
    def rows_by_source(self) -> dict[str, int]:
        """Rows of each source, the samples of one of its epochs."""
        return {
            name: rows.count for name, rows in zip(self.shards.sources, self._rows, strict=True)
        }

    def weights_by_tokens(self) -> dict[str, float]:
        """Each source's tokens, but 0 for a source that is too small for one row."""
        return {
            stream.sources[0]: float(stream.num_tokens if rows.count else 0)
            for stream, rows in zip(self._streams, self._rows, strict=True)
        }

    def step_batches(self, next_sample: int) -> list[Batch]:
        """This rank's micro-batches of the step whose first global sample is `next_sample`.

        Args:
            next_sample: Samples consumed by all ranks before this step.

        Returns:
            `accumulation` micro-batches.
        """
        return [
            self.read(
                next_sample
                + (micro_step * self.data_parallel_size + self.data_parallel_rank)
                * self.micro_batch_size,
                self.micro_batch_size,
            )
            for micro_step in range(self.accumulation)
        ]

    def prefetch(
        self, first_samples: Iterable[int], steps_ahead: int = 2
    ) -> Generator[list[Batch], None, None]:
        """Yield `step_batches` for one step after the other, read by a background thread.

        The position is the consumer's: it counts what it took, not what was read ahead. Close the
        iterator to stop the thread.

        Args:
            first_samples: The first global sample of each step.
            steps_ahead: Steps held ready.

        Raises:
            DataError: Reading failed in the thread.
        """
        ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(max(1, steps_ahead))
        stop = threading.Event()
        thread = threading.Thread(
            target=self._read_ahead, args=(first_samples, ready, stop), daemon=True, name="prefetch"
        )
        thread.start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()

    def _read_ahead(
        self,
        first_samples: Iterable[int],
        ready: "queue.Queue[list[Batch] | BaseException]",
        stop: threading.Event,
    ) -> None:
        """Fill the queue until told to stop; an error is the last item."""
        for first_sample in first_samples:
            item: list[Batch] | BaseException
            try:
                item = self.step_batches(first_sample)
            except BaseException as error:  # handed to the consumer, whatever it is
                item = error
            while not stop.is_set():
                try:
                    ready.put(item, timeout=POLL_S)
                    break
                except queue.Full:
                    continue
            if stop.is_set() or isinstance(item, BaseException):
                return

    def read(self, first_sample: int, count: int) -> Batch:
        """The rows of samples [first_sample, first_sample + count)."""
        length, places = self.sequence_length, self.sequence_length + self.future_tokens
        buffer = self._buffer(count)
        documents = np.empty((count, places), np.int32) if self.documents else None
        ends = self._fill(first_sample, buffer.rows, documents)
        # Tokens and labels are written once, straight from the stored type.
        views = np.empty((1 + self.future_tokens, count, length), np.int64)
        for ahead, view in enumerate(views):
            view[:] = buffer.tokens[:, ahead : ahead + length]
        tokens, labels = torch.from_numpy(views[0]), torch.from_numpy(views[1:])
        batch = Batch(tokens, labels)
        if min(ends) < places:
            _ignore_padding(batch.labels, torch.tensor(ends))
        if documents is None:
            return batch
        numbers_ahead = torch.from_numpy(documents)
        numbers_here = numbers_ahead[:, :length].contiguous()
        for head, labels in enumerate(batch.labels, start=1):
            labels.masked_fill_(numbers_ahead[:, head : head + length] != numbers_here, IGNORED)
        return batch._replace(documents=numbers_here)

    def _fill(
        self, first_sample: int, tokens: list[TokenArray], documents: NDArray[np.int32] | None
    ) -> list[int]:
        """Write the rows of samples from `first_sample` on; how many places of each hold tokens."""
        sources, rows = self._locate(first_sample, len(tokens))
        if len(self._rows) == 1:
            numbers = None if documents is None else list(documents)
            return self._rows[0].fill(rows, tokens, numbers)
        ends = [0] * len(rows)
        for source in set(sources):
            places = [place for place, chosen in enumerate(sources) if chosen == source]
            filled = self._rows[source].fill(
                [rows[place] for place in places],
                [tokens[place] for place in places],
                None if documents is None else [documents[place] for place in places],
            )
            for place, end in zip(places, filled, strict=True):
                ends[place] = end
        return ends

    def _buffer(self, count: int) -> "_RowBuffer":
        """Room for `count` rows as they are stored; each thread has its own, used again."""
        buffer: _RowBuffer | None = getattr(self._buffers, "last", None)
        if buffer is None or len(buffer.rows) != count:
            tokens = np.empty((count, self.sequence_length + self.future_tokens), self.shards.dtype)
            buffer = self._buffers.last = _RowBuffer(tokens, list(tokens))
        return buffer

    def _locate(self, first_sample: int, count: int) -> tuple[list[int], list[int]]:
        """Source number and row of each sample of a range."""
        first_block = first_sample // LOCATED_SAMPLES
        last_block = (first_sample + count - 1) // LOCATED_SAMPLES
        places = [self._block(block) for block in range(first_block, last_block + 1)]
        start = first_sample - first_block * LOCATED_SAMPLES
        sources, rows = np.concatenate(places, axis=1)[:, start : start + count].tolist()
        return sources, rows

    def _locate_block(self, block: int) -> NDArray[np.int64]:
        """Source numbers and rows `[2, LOCATED_SAMPLES]` of a block of samples, all at once.

        One by one they would take longer to find than to read. The last few are kept, by `_block`.
        """
        first = block * LOCATED_SAMPLES
        sources, indices = self.mixture.locate(np.arange(first, first + LOCATED_SAMPLES))
        rows = np.empty_like(indices)
        for source in np.unique(sources).tolist():
            chosen = np.flatnonzero(sources == source)
            epochs, places = np.divmod(indices[chosen], self._rows[source].count)
            rows[chosen] = places
            for epoch in np.unique(epochs).tolist() if self.shuffle else ():
                now = epochs == epoch
                rows[chosen[now]] = self._permutation(source, epoch)(places[now])
        return np.stack([sources, rows])

    def _make_permutation(self, source: int, epoch: int) -> Permutation:
        """The order of an epoch of a source; kept for the few in use, by `_permutation`."""
        fingerprint = self._streams[source].fingerprint
        return Permutation(self._rows[source].count, fingerprint, self.seed, epoch)

    def _check_size(self) -> None:
        have, name = self.shards.num_tokens, f"{self.shards.directory} ({self.shards.split})"
        window = self.sequence_length + self.future_tokens
        if self.num_samples == 0:
            raise DataError(
                f"{name} has {have:,} tokens, fewer than one window of sequence_length + "
                f"future_tokens = {window:,}; use shorter sequences or more data"
            )
        if self.num_samples < self.global_batch_size:
            raise DataError(
                f"{name} has {self.num_samples:,} windows of {self.sequence_length:,} tokens, "
                f"fewer than one global batch of {self.global_batch_size:,} (micro_size * "
                "accumulation * data-parallel ranks); use a smaller batch, shorter sequences or "
                "more data"
            )


def _ignore_padding(labels: Tensor, ends: Tensor) -> None:
    """Take out targets at and past the end of each row; a target at place t + k has to be there.

    Args:
        labels: `[n, B, S]`, changed in place.
        ends: `[B]` places of each row that hold tokens.
    """
    places = torch.arange(labels.shape[2])
    for head, head_labels in enumerate(labels, start=1):
        head_labels.masked_fill_(places + head >= ends[:, None], IGNORED)
