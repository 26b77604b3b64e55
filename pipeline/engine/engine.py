"""The training engine on DeepSpeed: one optimizer step, evaluation, and what a checkpoint holds.

What DeepSpeed does: partitions parameters, gradients and optimizer states (ZeRO), reduces
gradients, clips and steps. What is decided here: what the losses are divided by, and that a step
with non-finite gradients does not reach the weights. When each gradient arrives is the business
of an `Execution`: of the whole model, or of one pipeline stage.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from data_prep.loading.loader import Batch
from model.language_model import MultiTokenModel
from model.loss import IGNORED
from model.memory.segments import scored_labels
from model.structure.sharding import placement_of
from pipeline.checkpoint.sharded_tensors import Snapshot, StateFiles, run_key
from pipeline.config.run_config import RunConfig
from pipeline.distributed.agreement import Agreed, RankFlags, agree
from pipeline.distributed.topology import Topology
from pipeline.engine.evaluation import EvalResult, spelled_bytes
from pipeline.engine.optimizer import clip_whole_gradients
from pipeline.engine.optimizer_share import OptimizerShare


class StepResult(NamedTuple):
    """What one optimizer step did; the same on all ranks.

    Attributes:
        head_losses: `[n]` mean loss of each head over its valid targets, on the device.
        loss: their sum by the heads' weights, on the device.
        grad_norm: global gradient norm before clipping.
        applied: False when gradients were not finite or the loss above its limit, and the weights
            were left alone.
        agreed: what all ranks agreed on before the weights moved.
        sequence_losses: `[micro-batches, B]` float32, mean loss of head 1 over each sequence of
            this rank, on the device; 0 where another rank tells it. None without data.review.
    """

    head_losses: Tensor
    loss: Tensor
    grad_norm: float
    applied: bool
    agreed: Agreed
    sequence_losses: Tensor | None = None


class Execution(Protocol):
    """How micro-batches run through this rank's part of the model."""

    def run(
        self, batches: list[Batch], scales: Tensor, sequence_losses: Tensor | None = None
    ) -> Tensor:
        """Forward and backward of a step's micro-batches; each head's loss sum over them `[n]`.

        Args:
            batches: on the device.
            scales: `[n]`, factor on each head's loss sum.
            sequence_losses: `[micro-batches, B]` float64 of zeros, to which head 1's loss sum of
                each sequence is added where head 1 is on this rank; or None.
        """
        ...

    def evaluate(self, batches: Iterable[Batch], sequence_losses: Tensor | None = None) -> Tensor:
        """Sum of `evaluate_heads` over batches on the device, for all heads: `[3 * n]`.

        `sequence_losses` is that of `run`, with a row for each batch.
        """
        ...

    def weights_changed(self) -> None:
        """The optimizer moved, or weights were loaded; a collective."""
        ...

    def check(self) -> None:
        """See that what a snapshot would hold is consistent; a collective.

        Raises:
            TrainingError: it is not.
        """
        ...

    def idle_fractions(self) -> list[float]:
        """Share of the steps since the last call that each stage waited; none for one stage."""
        ...

    def own_seconds(self) -> float | None:
        """Seconds since the last call in which the device worked and waited for no other rank.

        None where the host's clock knows them. To be asked after `idle_fractions`.
        """
        ...

    @property
    def waiting_for(self) -> str | None:
        """Which transfer this rank is waiting for, if any."""
        ...


class Engine:
    """The model on this rank, wrapped by DeepSpeed; made by `pipeline.engine.build`.

    Args:
        config: the run.
        topology: the grid of ranks.
        deepspeed_engine: what `deepspeed.initialize` returned.
        share: what this rank owns of weights, gradients and moments.
        execution: how micro-batches run.
    """

    def __init__(
        self,
        config: RunConfig,
        topology: Topology,
        deepspeed_engine: Any,
        share: OptimizerShare,
        execution: Execution,
    ) -> None:
        self.config = config
        self.topology = topology
        self.model: MultiTokenModel = deepspeed_engine.module
        self.execution = execution
        self._engine = deepspeed_engine
        self._share = share
        self._head_weights: tuple[tuple[float, ...], Tensor] | None = None

    def train_step(
        self,
        batches: list[Batch],
        learning_rate: float,
        flags: Callable[[], RankFlags] = RankFlags,
        loss_limit: float = math.inf,
        head_weights: Sequence[float] | None = None,
    ) -> StepResult:
        """One optimizer step over this rank's micro-batches.

        Args:
            batches: the rank's micro-batches of the step, `batch.accumulation` of them.
            learning_rate: for this step.
            flags: what else this rank tells the others with the step; asked as late as possible.
            loss_limit: a weighted loss above it is not stepped on.
            head_weights: of each head's loss; None = those of a run's first step.
        """
        weights = self._weights_on_device(head_weights)
        batches = [self._scored(batch.to(self.topology.device)) for batch in batches]
        counts = self._global_sum(sum((b.labels != IGNORED).sum((1, 2)) for b in batches))
        # DeepSpeed averages over data-parallel ranks; the loss is a mean over global targets.
        scales = weights * self.topology.data_size / counts.clamp(min=1)
        told = self._room_for_sequences(batches)
        sums = self.execution.run(batches, scales, told)
        means = None if told is None else self._sequence_means(told, batches)
        head_losses = self._global_sum(sums) / counts.clamp(min=1)
        loss = (weights * head_losses).sum()
        finite = head_losses.isfinite().all() & (loss <= loss_limit)
        finite &= self._share.gradients_finite(self.topology.device)
        agreed = agree(finite, flags())
        norm = self._apply(learning_rate) if agreed.finite else None
        if norm is None:
            self._share.discard_gradients()
            return StepResult(head_losses, loss, float("nan"), False, agreed, means)
        self.execution.weights_changed()
        return StepResult(head_losses, loss, norm, True, agreed, means)

    def _room_for_sequences(self, batches: Sequence[Batch]) -> Tensor | None:
        """`[micro-batches, B]` for the losses of sequences, if the run wants them."""
        if self.config.data.review is None:
            return None
        shape = (len(batches), len(batches[0].tokens))
        return torch.zeros(shape, dtype=torch.float64, device=self.topology.device)

    def _sequence_means(self, sums: Tensor, batches: Sequence[Batch]) -> Tensor:
        """Mean loss of head 1 over each sequence, 0 with too few targets or on another rank."""
        review = self.config.data.review
        assert review is not None
        counts = torch.stack([(batch.labels[0] != IGNORED).sum(1) for batch in batches])
        speaks = self.topology.tensor_rank == 0 and 1 in self.model.heads.numbers
        counted = counts >= review.min_targets if speaks else torch.zeros_like(counts)
        return (sums / counts.clamp(min=1)).where(counted.bool(), 0.0).float()

    def _scored(self, batch: Batch) -> Batch:
        """The batch, without the targets that the mode of a memory leaves out."""
        sizes = self.config.model.memory
        return batch if sizes is None else batch._replace(labels=scored_labels(sizes, batch.labels))

    def _weights_on_device(self, head_weights: Sequence[float] | None) -> Tensor:
        """`[n]`; copied to the device when they change, not in every step."""
        wanted = tuple(head_weights or self.config.model.loss_weights(0))
        if self._head_weights is None or wanted != self._head_weights[0]:
            self._head_weights = wanted, torch.tensor(wanted, device=self.topology.device)
        return self._head_weights[1]

    def _apply(self, learning_rate: float) -> float | None:
        """Clip and step.

        Returns:
            The global gradient norm before clipping; None when it overflowed (finite gradients
            whose squares are not) and no step was taken. The same on all ranks.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if not self._share.deepspeed_clips:
            limit = self.config.optimizer.gradient_clipping
            norm = clip_whole_gradients(self.model.named_parameters(), limit, self.topology)
            if not math.isfinite(norm):
                return None
            self._engine.step()
            return norm
        self._engine.step()
        if not self._engine.was_step_applied():
            return None
        return float(self._engine.get_global_grad_norm())

    def _global_sum(self, tensor: Any) -> Tensor:
        """Sum over the ranks that hold different data."""
        dist.all_reduce(tensor, group=self.topology.get_data_parallel_group())
        return tensor

    def evaluate(self, batches: Iterable[Batch], token_bytes: Tensor | None = None) -> EvalResult:
        """Losses and head agreement over this rank's share of the validation samples.

        Every rank passes equally many batches; sequences that are only padding have no labels.

        Args:
            batches: of this rank.
            token_bytes: `[V]` float64, bytes that each token spells, for figures per byte.
        """
        device, heads = self.topology.device, self.config.model.future_tokens
        spelled = torch.zeros(heads, dtype=torch.float64)

        def moved() -> Iterator[Batch]:
            for batch in batches:
                batch = self._scored(batch)
                if token_bytes is not None:
                    spelled.add_(spelled_bytes(batch.labels.cpu(), token_bytes))
                yield batch.to(device)

        self._engine.eval()
        with torch.no_grad():
            sums = self.execution.evaluate(moved())
        self._engine.train()
        sums = self._global_sum(sums)
        if token_bytes is None:
            return EvalResult.from_sums(sums)
        return EvalResult.from_sums(sums, self._global_sum(spelled.to(device)))

    def sequence_losses(self, batches: Sequence[Batch]) -> Tensor:
        """What `StepResult.sequence_losses` would be, with the weights as they are: no step."""
        moved = [self._scored(batch.to(self.topology.device)) for batch in batches]
        told = self._room_for_sequences(moved)
        assert told is not None, "the run has data.review"
        self._engine.eval()
        with torch.no_grad():
            self.execution.evaluate(moved, told)
        self._engine.train()
        return self._sequence_means(told, moved)

    def snapshot(self) -> Snapshot:
        """This rank's share of weights and optimizer states, as views that training changes.

        A collective.

        Raises:
            TrainingError: the stages' copies of what they share differ.
        """
        self.execution.check()
        runs = {}
        for fragment in self._share.fragments():
            if placement_of(fragment.name).dim is None and self.topology.tensor_rank > 0:
                continue  # every tensor-parallel rank has the same, and the first one saves it
            start = fragment.start + (fragment.owned.start or 0)
            for kind, view in fragment.views.items():
                if (run := view[fragment.owned]).numel():
                    runs[run_key(kind, fragment.name, start)] = run
        return Snapshot(
            self.topology.info.rank,
            self.topology.tensor_rank,
            self.topology.tensor_size,
            self._share.adam_step,
            runs,
        )

    def load(self, directory: Path) -> None:
        """Read weights and optimizer states that were saved in any layout; a collective.

        Each rank reads its own share, a parameter at a time. The optimizer's settings stay those
        of this run.

        Raises:
            CheckpointError: the files do not hold this model.
        """
        files = StateFiles(directory, self.config.model)
        for fragment in self._share.fragments():
            for kind, view in fragment.views.items():
                part = files.part(
                    kind,
                    fragment.name,
                    tensor_rank=self.topology.tensor_rank,
                    tensor_size=self.topology.tensor_size,
                    start=fragment.start,
                    stop=fragment.stop,
                )
                view.copy_(part)
        self._share.adam_step = files.adam_step
        self._share.refresh_weights()
        self.execution.weights_changed()
