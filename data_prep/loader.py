"""Shards to training batches; the order is a pure function and the position is one integer.

Legend: B rows of a micro-batch, S sequence length, n heads (future tokens).
"""

import queue
import threading
from collections.abc import Generator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.errors import DataError
from data_prep.permutation import Permutation
from data_prep.shard_set import ShardSet

__all__ = ["Batch", "ShardSet", "TokenLoader"]

POLL_S = 0.1


class Batch(NamedTuple):
    """One micro-batch of one rank.

    Attributes:
        tokens: `[B, S]` int64.
        labels: `[n, B, S]` int64; labels[k - 1, b, t] is the token t + k of row b, the target of
            head k at t. -100 would mean ignored; windows overlap by n, so every target exists.
            Example with S = 3, n = 2 and the window [5, 6, 7, 8, 9]: tokens [5, 6, 7], labels
            [6, 7, 8] for head 1 and [7, 8, 9] for head 2.
        documents: `[B, S]` int32, or None when not asked for; the number of each token's document
            within its row: 0, 1, 2, ... A row that begins inside a document has the rest of that
            document as document 0.
    """

    tokens: Tensor
    labels: Tensor
    documents: Tensor | None = None


class TokenLoader:
    """Deals the windows of a shard set to data-parallel ranks.

    Window i starts at token i * S and is S + n long, so that the last positions have all their
    targets and the next window starts where the inputs of this one end. Samples are numbered
    through all epochs; sample s is window permutation(epoch)(s mod num_samples) of epoch
    s // num_samples. The sample at row b of micro-step a on rank r is

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
        shuffle: False = windows in stream order.

    Raises:
        DataError: The split is too small for one window or one global batch.
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
        self.num_samples = max(0, (shards.num_tokens - future_tokens) // sequence_length)
        self.global_batch_size = micro_batch_size * accumulation * data_parallel_size
        self._check_size()

    def step_batches(self, next_sample: int) -> list[Batch]:
        """This rank's micro-batches of the step whose first global sample is `next_sample`.

        Args:
            next_sample: Samples consumed by all ranks before this step.

        Returns:
            `accumulation` micro-batches.
        """
        return [
            self._micro_batch(
                next_sample
                + (micro_step * self.data_parallel_size + self.data_parallel_rank)
                * self.micro_batch_size
            )
            for micro_step in range(self.accumulation)
        ]

    def prefetch(
        self, next_sample: int, steps_ahead: int = 2
    ) -> Generator[list[Batch], None, None]:
        """Yield `step_batches` for this step and all that follow, read by a background thread.

        The position is the consumer's: it counts what it took, not what was read ahead. Close the
        iterator to stop the thread.

        Args:
            next_sample: Samples consumed by all ranks before the first step.
            steps_ahead: Steps held ready.

        Raises:
            DataError: Reading failed in the thread.
        """
        ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(max(1, steps_ahead))
        stop = threading.Event()
        thread = threading.Thread(
            target=self._read_ahead, args=(next_sample, ready, stop), daemon=True, name="prefetch"
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
        next_sample: int,
        ready: "queue.Queue[list[Batch] | BaseException]",
        stop: threading.Event,
    ) -> None:
        """Fill the queue until told to stop; an error is the last item."""
        failed = False
        while not failed and not stop.is_set():
            item: list[Batch] | BaseException
            try:
                item = self.step_batches(next_sample)
            except BaseException as error:  # handed to the consumer, whatever it is
                item, failed = error, True
            while not stop.is_set():
                try:
                    ready.put(item, timeout=POLL_S)
                    break
                except queue.Full:
                    continue
            next_sample += self.global_batch_size

    def _micro_batch(self, first_sample: int) -> Batch:
        samples = np.arange(first_sample, first_sample + self.micro_batch_size, dtype=np.int64)
        length, heads = self.sequence_length, self.future_tokens
        rows = np.empty((self.micro_batch_size, length + heads), dtype=np.int64)
        for row, window in zip(rows, self._windows(samples), strict=True):
            row[:] = self.shards.read(int(window) * length, length + heads)
        windows = torch.from_numpy(rows)
        shifted = [windows[:, head : head + length] for head in range(1, heads + 1)]
        return Batch(tokens=windows[:, :length].contiguous(), labels=torch.stack(shifted))

    def _windows(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """The window of each global sample."""
        epochs, places = np.divmod(samples, self.num_samples)
        if not self.shuffle:
            return places
        windows = np.empty_like(places)
        for epoch in np.unique(epochs):
            permutation = Permutation(
                self.num_samples, self.shards.fingerprint, self.seed, int(epoch)
            )
            windows[epochs == epoch] = permutation(places[epochs == epoch])
        return windows

    def _check_size(self) -> None:
        have, name = self.shards.num_tokens, f"{self.shards.directory} ({self.shards.split})"
        window = self.sequence_length + self.future_tokens
        if have < window:
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
