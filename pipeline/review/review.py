"""A run's review as its ranks see it: losses collected, sequences chosen, all ranks told."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from data_prep.loading.loader import Batch, TokenLoader
from data_prep.loading.selection import KeptSequences
from model.errors import CheckpointError
from pipeline.checkpoint.files import Entries
from pipeline.config.run_config import RunConfig
from pipeline.distributed.agreement import from_main, is_main
from pipeline.review.schedule import ReviewSchedule
from pipeline.review.statistics import Statistics

logger = logging.getLogger(__name__)

Score = Callable[[list[Batch]], Tensor]
_MOST_WAITING = 256  # steps


class Review:
    """Goes along with the training loop; every method but `note` and `figures` is a collective.

    Args:
        config: the run, with data.review.
        loader: of this rank; from now on it follows the order of the review.
        device: where the ranks' collectives run.
        checkpoint: that the run goes on from; None for a new run.
        next_sample: where it goes on.

    Raises:
        CheckpointError: the checkpoint lacks what the review needs.
    """

    def __init__(
        self,
        config: RunConfig,
        loader: TokenLoader,
        device: torch.device,
        checkpoint: Path | None,
        next_sample: int,
    ) -> None:
        assert config.data.review is not None
        self._device = device
        self._loader = loader
        self.schedule = ReviewSchedule(config.data.review, loader.num_samples)
        self.order = self.schedule.order(
            list(loader.sequences_by_source.values()), loader.fingerprint, loader.seed
        )
        loader.follow(self.order)
        self._waiting: list[tuple[int, int, Tensor]] = []
        self._statistics = Statistics(config.run.dir, config.data.review, self.schedule, self.order)
        self._on_main(lambda: self._statistics.restore(checkpoint, next_sample))

    def rescore(self, sample: int, score: Score) -> None:
        """Read sequences again, forward only, if a phase begins here that is chosen by that.

        Args:
            sample: where the run goes on.
            score: losses of sequences with the weights as they are; a collective.
        """
        self.flush()
        phase = self.order.pass_at(sample).phase
        again = self.schedule.rescored(phase)
        if again is None or sample != self.order.first_sample_of(phase):
            return
        logger.info("review: %s sequences are read again, forward only", f"{again.size:,}")
        layout, size = self._loader.layout, self._loader.global_batch_size
        for first in range(again.first_sample, again.end, size):
            batches = [
                self._loader.read(layout.first_sample(first, micro), layout.micro_size, again.end)
                for micro in range(layout.accumulation)
            ]
            self.note(first, min(first + size, again.end), score(batches))
            if self.is_full:
                self._record_again(phase)
        self._record_again(phase)
        self._on_main(lambda: self._statistics.finish_rescored(phase))

    def begin(self, sample: int) -> None:
        """Choose the sequences of the phase that a sample is in, if all are not in it."""
        self.flush()
        now = self.order.pass_at(sample)
        if now.chosen:
            self._choose(now.phase)

    def _record_again(self, phase: int) -> None:
        for first, losses in self._gathered():
            self._statistics.record_rescored(phase, first, losses)

    def _choose(self, phase: int) -> None:
        total = self.order.total
        bits = torch.empty(-(-total // 8), dtype=torch.uint8)

        def select() -> None:
            bits.copy_(torch.from_numpy(self._statistics.select(phase).bits))

        self._on_main(select)
        bits = bits.to(self._device)
        if dist.is_initialized():
            dist.broadcast(bits, 0)
        kept = KeptSequences(bits.cpu().numpy(), total)
        self.order.keep(phase, kept)
        logger.info(
            "review: phase %d (%s) has %s of %s sequences",
            phase + 1,
            self.schedule.phases[phase].name,
            f"{kept.count:,}",
            f"{total:,}",
        )

    def note(self, first_sample: int, end: int, losses: Tensor | None) -> None:
        """Remember the losses of a step, on the device.

        Args:
            first_sample: of the step.
            end: the sample after its last.
            losses: `[micro-batches, B]` of this rank.
        """
        assert losses is not None, "the engine gives losses of sequences when data.review is set"
        self._waiting.append((first_sample, end, losses))

    @property
    def is_full(self) -> bool:
        """Whether enough steps wait to be flushed; the same on all ranks."""
        return len(self._waiting) >= _MOST_WAITING

    def flush(self) -> None:
        """Bring what was noted to rank 0."""
        if not self._waiting:
            return
        first, end = self._waiting[0][0], self._waiting[-1][1]
        told = self._gathered()

        def record() -> None:
            for sample, losses in told:
                self._statistics.record(sample, losses)

        if any(first < one.end <= end for one in self.schedule.passes):
            self._on_main(record)  # which writes files
        else:
            record()

    def _gathered(self) -> list[tuple[int, NDArray[np.float32]]]:
        """What was noted, by its first sample, on rank 0; nothing on others. A collective.

        Each place is told by one rank and 0 on all others, so the sum is what that rank told.
        """
        layout, waiting = self._loader.layout, self._waiting
        if not waiting:
            return []
        shape = (len(waiting), layout.accumulation, layout.data_size, layout.micro_size)
        told = torch.zeros(shape, device=self._device)
        told[:, :, layout.data_rank] = torch.stack([losses for _, _, losses in waiting])
        if dist.is_initialized():
            dist.all_reduce(told)
        self._waiting = []
        if not is_main():
            return []
        return [
            (first, losses.reshape(-1)[: end - first])
            for (first, end, _), losses in zip(waiting, told.cpu().numpy(), strict=True)
        ]

    def files(self) -> Callable[[Path], Entries] | None:
        """What a checkpoint of this moment has of it; None on other ranks than 0."""
        self.flush()
        return self._statistics.files() if is_main() else None

    def figures(self, sample: int) -> dict[str, float]:
        """Of the step that a sample is in, for the metrics."""
        now = self.order.pass_at(sample)
        return {
            "review_phase": now.phase + 1,
            "review_repetition": now.repetition + 1,
            "review_epoch": now.number + 1,
            "review_sequences": now.size,
        }

    def _on_main(self, work: Callable[[], None]) -> None:
        """Let rank 0 work; every rank raises what it raises."""

        def told() -> None:
            try:
                work()
            except OSError as error:
                raise CheckpointError(
                    f"the losses of sequences cannot be kept in {self._statistics.folder} "
                    f"({error}); make room there, or make the folder writable, then start the same "
                    "command again"
                ) from error

        from_main(told, CheckpointError)
