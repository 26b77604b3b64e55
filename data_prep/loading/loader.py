"""Shards to training batches; the order is a pure function and the position is one integer.

Legend: B sequences of a micro-batch, S sequence length, n heads (future tokens).
"""

import queue
import threading
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.errors import DataError
from data_prep.loading.mixture import Mixture, MixtureSegment, block_counts
from data_prep.loading.order import Order, SampleOrder
from data_prep.loading.sequences import SequenceFormat, cut_sequences
from data_prep.shards.shard_set import ShardSet
from data_prep.tokenization.tokenizer import TokenArray

POLL_S = 0.1
IGNORED = -100


class Batch(NamedTuple):
    """One micro-batch of one rank.

    Attributes:
        tokens: `[B, S]` int64.
        labels: `[n, B, S]` int64; labels[k - 1, b, t] is the token t + k of sequence b, the
            target of head k at t. -100 = no target: padding; with `documents` a token of another
            document; and of prompts and completions a token of a prompt, and one of another
            document whether or not `documents` are asked for. Example with S = 3, n = 2 and
            [5, 6, 7, 8, 9]: tokens [5, 6, 7], labels [6, 7, 8] for head 1 and [7, 8, 9] for head 2;
            if a document ends with the 7, [6, 7, -100] and [7, -100, -100].
        documents: `[B, S]` int32, or None when not asked for; the number of each token's document
            within its sequence: 0, 1, 2, ... A sequence that begins inside a document has the rest
            of that document as document 0; padding counts as one more document.
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


class _Buffer(NamedTuple):
    """Tokens `[B, S + n]`, and a view of each sequence."""

    tokens: TokenArray
    sequences: list[TokenArray]


@dataclass(frozen=True)
class BatchLayout:
    """How the global batch of a step is dealt to data-parallel ranks and micro-steps.

    The sample at batch position b of micro-step a on rank r is

        next_sample + a * (micro * ranks) + r * micro + b

    so a step has the same samples for every split of its global batch.

    Attributes:
        micro_size: B, sequences per rank and micro-step.
        accumulation: Micro-steps per step.
        data_rank: This rank, among those that read different data.
        data_size: Number of such ranks.
    """

    micro_size: int
    accumulation: int = 1
    data_rank: int = 0
    data_size: int = 1

    def __post_init__(self) -> None:
        assert min(self.micro_size, self.accumulation) > 0, self
        assert 0 <= self.data_rank < self.data_size, self

    @property
    def global_size(self) -> int:
        """Samples of a step, over all ranks."""
        return self.micro_size * self.accumulation * self.data_size

    def first_sample(self, next_sample: int, micro_step: int) -> int:
        """The first of this rank's samples in a micro-step of the step that starts there."""
        return next_sample + (micro_step * self.data_size + self.data_rank) * self.micro_size


class TokenLoader:
    """Deals the sequences of a shard set to data-parallel ranks.

    Samples are numbered through the whole run; `data_prep.loading.order` says which sequence each
    one is, and `BatchLayout` which rank reads it when.

    Args:
        shards: The split to read.
        sequence_format: How its streams become sequences.
        layout: This rank's share of each global batch.
        seed: The run's seed.
        shuffle: False = sequences in stream order.
        weights: Share of samples of each source; None = by tokens. Sources that are not named get
            none.

    Attributes:
        mixture: Where samples come from; may be replaced before the first batch is read.
        num_samples: Sequences of all sources together, one epoch of each.
        padding_share: Share of input positions of those sequences without a token.
        global_batch_size: Samples of a step, over all ranks.

    Raises:
        DataError: The split is too small for one sequence or one global batch.
    """

    def __init__(
        self,
        shards: ShardSet,
        sequence_format: SequenceFormat,
        layout: BatchLayout,
        *,
        seed: int,
        shuffle: bool = True,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.shards = shards
        self.sequence_format = sequence_format
        self.layout = layout
        self.seed = seed
        self.shuffle = shuffle
        self._streams = [shards.of_source(name) for name in shards.sources]
        self._has_targets = [stream.has_targets for stream in self._streams]
        self._sequences = [cut_sequences(stream, sequence_format) for stream in self._streams]
        self.num_samples = sum(cut.count for cut in self._sequences)
        self.padding_share = sum(cut.padding_share * cut.count for cut in self._sequences) / (
            self.num_samples or 1
        )
        self.global_batch_size = layout.global_size
        self._buffers = threading.local()
        self._check_size()
        counts = block_counts(weights or self.weights_by_tokens())
        self.mixture = Mixture(shards.sources, [MixtureSegment(first_sample=0, counts=counts)])

    @property
    def mixture(self) -> Mixture:
        """Where samples come from, unless the loader follows another order."""
        return self._mixture

    @mixture.setter
    def mixture(self, mixture: Mixture) -> None:
        for segment in mixture.segments:
            empty = [name for name, count in self.sequences_by_source.items() if not count]
            assert not any(segment.share(name) for name in empty), (segment, empty)
        self._mixture = mixture
        self._order: Order = SampleOrder(
            mixture,
            [cut.count for cut in self._sequences],
            [stream.fingerprint for stream in self._streams],
            seed=self.seed,
            shuffle=self.shuffle,
        )

    @property
    def fingerprint(self) -> str:
        """Of what is read: that of the only source, or of the split."""
        return self._streams[0].fingerprint if len(self._streams) == 1 else self.shards.fingerprint

    def follow(self, order: Order) -> None:
        """Take samples in this order instead of the mixture's; before the first batch is read."""
        self._order = order

    def step_end(self, next_sample: int) -> int:
        """The sample after the last one of the step that begins with `next_sample`."""
        return self._order.step_end(next_sample, self.global_batch_size)

    @property
    def sequences_by_source(self) -> dict[str, int]:
        """Sequences of each source, the samples of one of its epochs."""
        return {
            name: cut.count for name, cut in zip(self.shards.sources, self._sequences, strict=True)
        }

    def weights_by_tokens(self) -> dict[str, float]:
        """Each source's tokens, but 0 for a source that is too small for one sequence."""
        return {
            stream.sources[0]: float(stream.num_tokens if cut.count else 0)
            for stream, cut in zip(self._streams, self._sequences, strict=True)
        }

    def step_batches(self, next_sample: int) -> list[Batch]:
        """This rank's micro-batches of the step whose first global sample is `next_sample`.

        Args:
            next_sample: Samples consumed by all ranks before this step.

        Returns:
            `accumulation` micro-batches; in a step that ends sooner, the places of samples past its
            end hold the last sample without targets.
        """
        end, size = self.step_end(next_sample), self.layout.micro_size
        return [
            self.read(self.layout.first_sample(next_sample, micro_step), size, end)
            for micro_step in range(self.layout.accumulation)
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
            except BaseException as error:  # raised in the consumer, whatever it is
                item = error
            while not stop.is_set():
                try:
                    ready.put(item, timeout=POLL_S)
                    break
                except queue.Full:
                    continue
            if stop.is_set() or isinstance(item, BaseException):
                return

    def read(self, first_sample: int, count: int, end: int | None = None) -> Batch:
        """Samples [first_sample, first_sample + count).

        Args:
            first_sample: The first.
            count: How many.
            end: Those from this one on are its predecessor, and have no targets.
        """
        form = self.sequence_format
        length, stored = form.sequence_length, form.stored_tokens
        buffer = self._buffer(count)
        documents = np.empty((count, stored), np.int32) if form.documents else None
        targets: NDArray[np.bool_] | None = None
        if self.shards.has_targets:
            # Sequences of texts, in a mixture with others, leave these as they are: all of them one
            # document, all of it targets.
            documents = np.zeros((count, stored), np.int32) if documents is None else documents
            targets = np.ones((count, stored), np.bool_)
        sources, numbers, wanted = self._locate(first_sample, count, end)
        ends = self._fill(sources, numbers, buffer.sequences, documents, targets)
        # Tokens and labels are written once, straight from the stored type.
        views = np.empty((1 + form.future_tokens, count, length), np.int64)
        for ahead, view in enumerate(views):
            view[:] = buffer.tokens[:, ahead : ahead + length]
        tokens, labels = torch.from_numpy(views[0]), torch.from_numpy(views[1:])
        batch = Batch(tokens, labels)
        batch.labels[:, wanted:] = IGNORED
        if min(ends) < stored:
            _ignore_padding(batch.labels, torch.tensor(ends))
        if documents is None:
            return batch
        if targets is not None:
            _ignore_prompts(batch.labels, torch.from_numpy(targets))
        numbers_ahead = torch.from_numpy(documents)
        numbers_here = numbers_ahead[:, :length].contiguous()
        for head, labels in enumerate(batch.labels, start=1):
            labels.masked_fill_(numbers_ahead[:, head : head + length] != numbers_here, IGNORED)
        return batch._replace(documents=numbers_here) if form.documents else batch

    def _locate(
        self, first_sample: int, count: int, end: int | None
    ) -> tuple[list[int], list[int], int]:
        """Sources and sequences of `count` places, and how many of them come before the end."""
        wanted = count if end is None else max(0, min(count, end - first_sample))
        sources, numbers = self._order.locate(first_sample, wanted) if wanted else ([], [])
        if missing := count - wanted:
            assert end is not None
            (source,), (number,) = self._order.locate(end - 1, 1)
            sources, numbers = sources + [source] * missing, numbers + [number] * missing
        return sources, numbers, wanted

    def _fill(
        self,
        sources: list[int],
        numbers: list[int],
        tokens: list[TokenArray],
        documents: NDArray[np.int32] | None,
        targets: NDArray[np.bool_] | None,
    ) -> list[int]:
        """Write sequences; how many positions of each hold tokens."""
        if len(self._sequences) == 1:
            document_rows = None if documents is None else list(documents)
            target_rows = None if targets is None else list(targets)
            return self._sequences[0].fill(numbers, tokens, document_rows, target_rows)
        ends = [0] * len(numbers)
        for source in set(sources):
            chosen = [index for index, other in enumerate(sources) if other == source]
            marked = targets if self._has_targets[source] else None
            is_numbered = marked is not None or self.sequence_format.documents
            numbered = documents if is_numbered else None
            filled = self._sequences[source].fill(
                [numbers[index] for index in chosen],
                [tokens[index] for index in chosen],
                None if numbered is None else [numbered[index] for index in chosen],
                None if marked is None else [marked[index] for index in chosen],
            )
            for index, end in zip(chosen, filled, strict=True):
                ends[index] = end
        return ends

    def _buffer(self, count: int) -> "_Buffer":
        """Room for `count` sequences as they are stored; each thread has its own, used again."""
        buffer: _Buffer | None = getattr(self._buffers, "last", None)
        if buffer is None or len(buffer.sequences) != count:
            tokens = np.empty((count, self.sequence_format.stored_tokens), self.shards.dtype)
            buffer = self._buffers.last = _Buffer(tokens, list(tokens))
        return buffer

    def _check_size(self) -> None:
        have, name = self.shards.num_tokens, f"{self.shards.directory} ({self.shards.split})"
        form = self.sequence_format
        if self.num_samples == 0:
            raise DataError(
                f"{name} has {have:,} tokens, fewer than one sequence of sequence_length + "
                f"future_tokens = {form.stored_tokens:,}; use shorter sequences or more data"
            )
        if self.num_samples < self.global_batch_size:
            raise DataError(
                f"{name} has {self.num_samples:,} sequences of {form.sequence_length:,} tokens, "
                f"fewer than one global batch of {self.global_batch_size:,} (micro_size * "
                "accumulation * data-parallel ranks); use a smaller batch, shorter sequences or "
                "more data"
            )


def _ignore_prompts(labels: Tensor, targets: Tensor) -> None:
    """Take out what may not be a target: of head k at t the token t + k is looked at.

    Args:
        labels: `[n, B, S]`, changed in place.
        targets: `[B, S + n]`, whether the token at a position may be one.
    """
    length = labels.shape[2]
    for head, head_labels in enumerate(labels, start=1):
        head_labels.masked_fill_(~targets[:, head : head + length], IGNORED)


def _ignore_padding(labels: Tensor, ends: Tensor) -> None:
    """Take out targets at and past the end of each sequence; one at t + k has to be before it.

    Args:
        labels: `[n, B, S]`, changed in place.
        ends: `[B]` positions of each sequence that hold tokens.
    """
    positions = torch.arange(labels.shape[2])
    for head, head_labels in enumerate(labels, start=1):
        head_labels.masked_fill_(positions + head >= ends[:, None], IGNORED)
