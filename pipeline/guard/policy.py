"""What follows when a step was not taken: the next one, the last checkpoint, or the end."""

import logging
import math
from collections.abc import Callable

from model.errors import TrainingError
from pipeline.checkpoint.train_state import TrainState
from pipeline.config.sections import TrainSection
from pipeline.data.batch_order import BatchPosition
from pipeline.guard.loss_limit import loss_limit

logger = logging.getLogger(__name__)


class GoBack(Exception):
    """The run is to go on from its last checkpoint, without the batches since then.

    Args:
        step: that was not taken.
        last_batch: that it would have trained on.
        reason: why not.
    """

    def __init__(self, step: int, last_batch: int, reason: str) -> None:
        super().__init__(f"step {step}: {reason}")
        self.step = step
        self.last_batch = last_batch
        self.reason = reason


class Guard:
    """Judges steps by what the configuration says; the same on all ranks.

    Args:
        options: `train.on_nonfinite`, `train.on_spike` and their limits.
        state: progress; the losses that the limit comes from are kept in it.
    """

    def __init__(self, options: TrainSection, state: TrainState) -> None:
        self._options = options
        self._state = state
        self._left_out_in_a_row = 0

    @property
    def loss_limit(self) -> float:
        """The loss above which the coming step is not taken."""
        if self._options.on_spike == "ignore":
            return math.inf
        return loss_limit(
            self._state.recent_losses,
            sigmas=self._options.spike_sigmas,
            window=self._options.spike_window,
        )

    def forget_losses(self) -> None:
        """What the loss is the sum of changes: those before are of another scale."""
        self._state.recent_losses.clear()

    def taken(self, loss: Callable[[], float]) -> None:
        """A step was taken.

        Args:
            loss: gives its loss; to know that is to wait for the device.
        """
        self._left_out_in_a_row = 0
        if self._options.on_spike != "ignore":
            losses = self._state.recent_losses
            losses.append(loss())
            del losses[: -self._options.spike_window]

    def left_out(
        self, loss: float, limit: float, position: BatchPosition, *, can_go_back: bool
    ) -> None:
        """A step was not taken; weights and optimizer are unchanged.

        Args:
            loss: that it had.
            limit: the `loss_limit` it was given.
            position: of its batch.
            can_go_back: whether there is a checkpoint of this run.

        Raises:
            GoBack: the run is to go back.
            TrainingError: it is to end.
        """
        spike = math.isfinite(loss) and loss > limit
        key = "train.on_spike" if spike else "train.on_nonfinite"
        action = self._options.on_spike if spike else self._options.on_nonfinite
        reason = (
            f"the loss of {loss:.4f} is above {limit:.4f}, the limit of train.spike_sigmas="
            f"{self._options.spike_sigmas:g}"
            if spike
            else "loss or gradients are not finite"
        )
        self._left_out_in_a_row += 1
        logger.warning(
            "step %d skipped: %s (batch %d, samples %d to %d); weights and optimizer are unchanged",
            self._state.step,
            reason,
            position.batch,
            position.first_sample,
            self._state.next_sample - 1,
        )
        if action == "stop":
            raise TrainingError(
                f"step {self._state.step}: {reason} (batch {position.batch}), and {key}=stop; look "
                "at that batch, then resume with data.skip_batches (not with data.review), a lower "
                f"optimizer.learning_rate, or {key}=skip"
            )
        if action == "rollback":
            self._go_back(reason, position, can_go_back)
        self._check_number(reason)

    def _go_back(self, reason: str, position: BatchPosition, can_go_back: bool) -> None:
        done, most = len(self._state.rollbacks), self._options.max_rollbacks
        if not can_go_back:
            logger.warning(
                "there is no checkpoint to go back to yet; the run goes on without the step"
            )
        elif done >= most:
            raise TrainingError(
                f"step {self._state.step}: {reason}, after {done} rollbacks, as many as "
                f"train.max_rollbacks={most} allows; lower optimizer.learning_rate, look at the "
                "batches that were skipped, or raise train.max_rollbacks"
            )
        else:
            raise GoBack(self._state.step, position.batch, reason)

    def _check_number(self, reason: str) -> None:
        limit = self._options.max_skipped_steps
        if self._left_out_in_a_row > limit:
            raise TrainingError(
                f"{self._left_out_in_a_row} steps in a row were skipped, more than "
                f"train.max_skipped_steps={limit}, the last because {reason}; lower "
                "optimizer.learning_rate, or resume from an earlier checkpoint"
            )
