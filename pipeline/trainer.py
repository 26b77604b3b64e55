"""The training loop: when things happen. What happens is the collaborators' business."""

import functools
import logging
import math
from collections.abc import Generator
from contextlib import closing
from typing import NamedTuple

from torch import Tensor

from data_prep.loading.loader import Batch, TokenLoader
from model.errors import TrainingError
from model.structure.head_weights import is_schedule
from pipeline.checkpoint.saving import Saver
from pipeline.checkpoint.train_state import TrainState
from pipeline.config.run_config import RunConfig
from pipeline.data.batch_order import (
    StepBatches,
    batch_positions,
    read_steps,
    stretch_positions,
)
from pipeline.data.device_copies import batches_on
from pipeline.data.validation import ValidationSamples
from pipeline.distributed.agreement import RankFlags
from pipeline.distributed.signals import StopRequest
from pipeline.engine.engine import Engine, StepResult
from pipeline.engine.schedule import learning_rate
from pipeline.guard.policy import GoBack, Guard
from pipeline.guard.progress import Progress
from pipeline.reporting.metrics import MetricsLog, Record
from pipeline.reporting.throughput import Throughput
from pipeline.review.review import Review

logger = logging.getLogger(__name__)


class Collaborators(NamedTuple):
    """What the loop drives; all built outside.

    Attributes:
        engine: model and optimizer.
        loader: training batches.
        validation: validation batches, or None when the run does not validate.
        saver: saves the run, while it goes on.
        metrics: where figures go.
        throughput: times steps and measures memory.
        stop: signals, agreed over ranks.
        progress: told what is being done.
        review: of a run with data.review; else None.
    """

    engine: Engine
    loader: TokenLoader
    validation: ValidationSamples | None
    saver: Saver
    metrics: MetricsLog
    throughput: Throughput
    stop: StopRequest
    progress: Progress
    review: Review | None = None


class Trainer:
    """Runs steps until the run is done or told to stop.

    Args:
        config: the run.
        state: progress so far; advanced in place.
        parts: the collaborators.
    """

    def __init__(self, config: RunConfig, state: TrainState, parts: Collaborators) -> None:
        self.config = config
        self.state = state
        self.parts = parts
        self._guard = Guard(config.train, state)

    def fit(self) -> str | None:
        """Train to the last step.

        Returns:
            The name of the signal that stopped the run before its last step, or None.

        Raises:
            TrainingError: bad steps end the run, see `pipeline.guard`.
            GoBack: the run is to go on from its last checkpoint.
            CheckpointError: the last save failed, or any with `checkpoint.on_error: stop`.
        """
        stopped_by = None
        try:
            with closing(self._read_steps()) as steps:
                while self.state.step < self.config.last_step and stopped_by is None:
                    self.parts.progress.enter("step")
                    result = self._step(next(steps))
                    evaluation = self._evaluate_if_due()
                    self._record(result, evaluation)
                    self._save_if_due(result)
                    stopped_by = result.agreed.signal
        except (TrainingError, GoBack):
            self.parts.progress.enter("save")
            self.parts.saver.finish("the run ends")  # what was begun before still counts
            raise
        self._save_last()
        return stopped_by if self.state.step < self.config.last_step else None

    def _read_steps(self) -> Generator[StepBatches, None, None]:
        """The batches of this step and all that follow."""
        if self.parts.review is not None:
            return self._read_review(self.parts.review)
        positions = functools.partial(
            batch_positions,
            batches_behind=self.state.batches,
            next_sample=self.state.next_sample,
            batch_samples=self.parts.loader.global_batch_size,
            skip=(
                *self.config.data.skip_batches,
                *(rollback.batches for rollback in self.state.rollbacks),
            ),
        )
        steps = read_steps(self.parts.loader, positions, self.config.data.prefetch_steps)
        return batches_on(self.parts.engine.topology.device, steps)

    def _read_review(self, review: Review) -> Generator[StepBatches, None, None]:
        """The same of a run whose later sequences are chosen by the losses of earlier ones.

        Reading ahead ends where the next sequences are not known yet.
        """
        while self.state.next_sample < review.order.end:
            # Losses are gathered, and arrays read and written, which takes as long as a start.
            self.parts.progress.enter("start")
            review.rescore(self.state.next_sample, self._score)
            self.parts.progress.enter("start")
            review.begin(self.state.next_sample)
            self.parts.progress.enter("step")
            positions = functools.partial(
                stretch_positions,
                batches_behind=self.state.batches,
                next_sample=self.state.next_sample,
                end=review.order.stretch_end(self.state.next_sample),
                batch_samples=self.parts.loader.global_batch_size,
            )
            steps = read_steps(self.parts.loader, positions, self.config.data.prefetch_steps)
            with closing(batches_on(self.parts.engine.topology.device, steps)) as ahead:
                yield from ahead

    def _score(self, batches: list[Batch]) -> Tensor:
        """Losses of sequences that are read again, forward only."""
        self.parts.progress.enter("step")
        return self.parts.engine.sequence_losses(batches)

    def _step(self, batches: StepBatches) -> StepResult:
        """One optimizer step, and the progress it makes."""
        position = batches.position
        if position.skipped:
            logger.info(
                "batches %d to %d skipped, as data.skip_batches or a rollback says",
                position.batch - position.skipped,
                position.batch - 1,
            )
        rate = self._learning_rate(self.state.step + 1)
        self._note_new_weights()
        self.parts.throughput.start()
        limit = self._guard.loss_limit
        result = self.parts.engine.train_step(
            batches.micro_batches, rate, self._flags, limit, self._weights_of_next_step()
        )
        self.parts.throughput.stop()
        end = self.parts.loader.step_end(position.first_sample)
        if self.parts.review is not None:
            self.parts.review.note(position.first_sample, end, result.sequence_losses)
        self.state.advance(
            samples=self.parts.loader.global_batch_size,
            applied=result.applied,
            skipped_batches=position.skipped,
            missing_samples=position.first_sample + self.parts.loader.global_batch_size - end,
        )
        if result.applied:
            self._guard.taken(result.loss.item)
        else:
            can_go_back = self.parts.saver.saved_step is not None
            self._guard.left_out(result.loss.item(), limit, position, can_go_back=can_go_back)
        return result

    def _weights_of_next_step(self) -> tuple[float, ...]:
        return self.config.model.loss_weights(self.state.step)

    def _note_new_weights(self) -> None:
        """Say so when the heads' weights change with the coming step."""
        step = self.state.step
        if step and (after := self._weights_of_next_step()) != self.config.model.loss_weights(
            step - 1
        ):
            logger.info("step %d: head weights are %s from here on", step + 1, list(after))
            self._guard.forget_losses()

    def _flags(self) -> RankFlags:
        """What this rank tells the others with a step."""
        return RankFlags(self.parts.stop.received, self.parts.saver.is_done)

    def _learning_rate(self, step: int) -> float:
        return learning_rate(
            step,
            schedule=self.config.schedule,
            peak=self.config.optimizer.learning_rate,
            total_steps=self.config.steps,
        )

    def _record(self, result: StepResult, evaluation: Record) -> None:
        """Write this step's figures when they are due, with those of an evaluation if any."""
        step, options = self.state.step, self.config
        due = step % options.log.interval == 0 or self._is_last_planned
        review = self.parts.review
        if review is not None and (due or review.is_full):
            review.flush()
        if not (due or evaluation or not result.applied):
            return
        losses, weights = result.head_losses.tolist(), options.model.loss_weights(step - 1)
        execution = self.parts.engine.execution
        idle = execution.idle_fractions()
        record: Record = {
            "step": step,
            "tokens": self.state.tokens,
            "loss": sum(w * loss for w, loss in zip(weights, losses, strict=True)),
            **{f"loss_head_{k}": loss for k, loss in enumerate(losses, start=1)},
            "grad_norm": result.grad_norm,
            "learning_rate": self._learning_rate(step),
            **self.parts.throughput.figures(execution.own_seconds()),
            **self._source_figures(),
            **self.parts.saver.figures(),
        }
        if is_schedule(options.model.head_weights):
            record["head_weights"] = list(weights)
        if review is not None:
            record |= review.figures(self.state.next_sample - 1)
        if idle:
            record["stage_idle_fraction"] = idle
        if not result.applied:
            record["skipped"] = 1
        if self.state.rollbacks:
            record["rollbacks"] = len(self.state.rollbacks)
        self.parts.metrics.write(record | evaluation)

    @property
    def _is_last_planned(self) -> bool:
        """Whether this is the last step of the whole plan.

        Not stop_at_step: a run stopped and resumed writes what an uninterrupted one writes.
        """
        return self.state.step == self.config.steps

    def _source_figures(self) -> Record:
        """Samples and epochs of each source so far; empty with one source."""
        if not self.state.mixture:
            return {}
        loader = self.parts.loader
        figures: Record = {}
        for name, samples in loader.mixture.counts(self.state.next_sample).items():
            figures[f"samples_{name}"] = samples
            figures[f"epochs_{name}"] = samples / max(loader.sequences_by_source[name], 1)
        return figures

    def _evaluate_if_due(self) -> Record:
        """Validate when it is due; the figures, empty when it is not."""
        due = self.state.step % (self.config.eval.every_steps or 1) == 0 or self._is_last_planned
        if self.parts.validation is None or not due:
            return {}
        self.parts.progress.enter("evaluation")
        validation = self.parts.validation
        result = self.parts.engine.evaluate(validation, validation.token_bytes)
        weights = self.config.model.loss_weights(self.state.step - 1)
        losses = result.head_losses
        loss = sum(w * loss for w, loss in zip(weights, losses, strict=True))
        self.state.eval_loss = loss if math.isfinite(loss) else None
        return {
            "eval_loss": loss,
            **{f"eval_loss_head_{k}": loss for k, loss in enumerate(losses, start=1)},
            **{
                f"eval_bits_per_byte_head_{k}": bits
                for k, bits in enumerate(result.bits_per_byte or (), start=1)
            },
            "eval_tokens_per_forward": result.tokens_per_forward,
        }

    def _save_if_due(self, result: StepResult) -> None:
        """Commit what has been written meanwhile, and begin the next save when it is due."""
        self.parts.saver.advance(all_done=result.agreed.save_done)
        every = self.config.checkpoint.every_steps
        if every and self.state.step % every == 0:
            self.parts.progress.enter("save")
            self._begin_save(asynchronous=self.config.checkpoint.asynchronous)

    def _begin_save(self, *, asynchronous: bool, last: bool = False) -> None:
        loader, saver = self.parts.loader, self.parts.saver
        if self.state.mixture:
            self.state.samples_by_source = loader.mixture.counts(self.state.next_sample)
        saver.begin(
            self.state,
            self.parts.engine.snapshot,
            asynchronous=asynchronous,
            last=last,
            beside=self.parts.metrics.sync,  # no line of a step that is saved may be lost
            more=self.parts.review.files() if self.parts.review is not None else None,
        )
        if not asynchronous:
            saver.finish()

    def _save_last(self) -> None:
        """See that the progress of this run is saved before it ends.

        Raises:
            CheckpointError: it cannot be saved.
        """
        saver = self.parts.saver
        self.parts.progress.enter("save")
        saver.finish("the run ends")
        if saver.saved_step != self.state.step:
            self._begin_save(asynchronous=False, last=True)
        saver.close()
