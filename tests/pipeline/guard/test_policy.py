"""What follows from a step that was not taken, by configuration."""

import math
from typing import Any

import pytest

from model.errors import TrainingError
from pipeline.checkpoint.train_state import Rollback, TrainState
from pipeline.config.sections import TrainSection
from pipeline.data.batch_order import BatchPosition
from pipeline.guard.policy import GoBack, Guard
from tests.support.checkpoint_cases import LAYOUT

HERE = BatchPosition(batch=12, first_sample=88, skipped=0)


def _guard(**options: Any) -> tuple[Guard, TrainState]:
    state = TrainState(
        step=11, next_sample=96, data_fingerprint="a", data_seed=1, sequence_length=8, layout=LAYOUT
    )
    section = TrainSection(steps=100, spike_window=4, spike_sigmas=10, **options)
    return Guard(section, state), state


def _spike(guard: Guard, *, can_go_back: bool = True) -> None:
    for _ in range(4):
        guard.taken(lambda: 2.0)
    limit = guard.loss_limit
    assert limit == pytest.approx(2.1)
    guard.left_out(2.2, limit, HERE, can_go_back=can_go_back)


def _not_finite(guard: Guard, *, can_go_back: bool = True) -> None:
    guard.left_out(math.nan, guard.loss_limit, HERE, can_go_back=can_go_back)


def test_without_a_policy_no_loss_is_looked_at() -> None:
    """To look at it would be to wait for the device."""
    guard, state = _guard()

    def loss() -> float:
        raise AssertionError("asked for the loss")

    guard.taken(loss)
    assert guard.loss_limit == math.inf
    assert state.recent_losses == []


def test_a_spike_is_skipped_and_does_not_count_among_the_losses() -> None:
    """The limit stays what it was."""
    guard, state = _guard(on_spike="skip")
    _spike(guard)
    assert state.recent_losses == [2.0] * 4
    assert guard.loss_limit == pytest.approx(2.1)


def test_the_window_slides() -> None:
    """It keeps the newest losses."""
    guard, state = _guard(on_spike="skip")
    for loss in (5.0, 4.0, 3.0, 2.0, 1.0):
        guard.taken(lambda loss=loss: loss)  # type: ignore[misc]
    assert state.recent_losses == [4.0, 3.0, 2.0, 1.0]


def test_each_kind_follows_its_own_key() -> None:
    """One rolls back, the other is skipped; and the other way round."""
    guard, _ = _guard(on_spike="rollback")
    _not_finite(guard)
    with pytest.raises(GoBack) as caught:
        _spike(guard)
    assert (caught.value.step, caught.value.last_batch) == (11, 12)
    assert "the loss of 2.2000 is above 2.1000" in caught.value.reason
    guard, _ = _guard(on_spike="skip", on_nonfinite="rollback")
    _spike(guard)
    with pytest.raises(GoBack, match="step 11: loss or gradients are not finite"):
        _not_finite(guard)


def test_stop_names_step_batch_and_key() -> None:
    """With what to do."""
    guard, _ = _guard(on_spike="stop")
    with pytest.raises(
        TrainingError,
        match=r"step 11: .* \(batch 12\), and train.on_spike=stop; .*"
        r"data.skip_batches \(not with data.review\)",
    ):
        _spike(guard)


def test_before_the_first_checkpoint_the_step_alone_is_left_out() -> None:
    """There is nothing to go back to; too many in a row still end the run."""
    guard, _ = _guard(on_nonfinite="rollback", max_skipped_steps=2)
    _not_finite(guard, can_go_back=False)
    _not_finite(guard, can_go_back=False)
    with pytest.raises(TrainingError, match="3 steps in a row were skipped"):
        _not_finite(guard, can_go_back=False)


def test_rollbacks_come_to_an_end() -> None:
    """Those of earlier parts of the run count."""
    guard, state = _guard(on_nonfinite="rollback", max_rollbacks=1)
    state.rollbacks = [Rollback(step=5, batches=(4, 5), reason="x")]
    with pytest.raises(
        TrainingError, match=r"after 1 rollbacks, as many as train\.max_rollbacks=1"
    ):
        _not_finite(guard)


def test_a_step_that_is_taken_ends_the_row() -> None:
    """Only steps one after the other count."""
    guard, _ = _guard(max_skipped_steps=1)
    for _ in range(3):
        _not_finite(guard)
        guard.taken(lambda: 2.0)
