"""The model's age taken out of losses: early sequences are not chosen for being early."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.config.review_section import ReviewPhase, ReviewSection
from pipeline.review.schedule import ReviewSchedule
from pipeline.review.staleness import without_running_mean
from pipeline.review.statistics import Statistics

TOTAL = 1000


def _chosen(folder: Path, **options: object) -> set[int]:
    """Numbers of the sequences kept after an epoch whose losses fall, of which every other is hard.

    A sequence is as hard as its number says, odd or even, and 6 nats harder at the epoch's
    beginning than at its end.
    """
    phases = (ReviewPhase(name="learn"), ReviewPhase(name="focus", drop_percent=50.0))
    section = ReviewSection.model_validate({"phases": phases, **options})
    schedule = ReviewSchedule(section, TOTAL)
    order = schedule.order([TOTAL], "f", 3)
    statistics = Statistics(folder, section, schedule, order)
    statistics.restore(None, 0)
    numbers = order.numbers(0, TOTAL)
    losses = 1 + numbers % 2 + 6 * np.linspace(1, 0, TOTAL)
    for first in range(0, TOTAL, 16):
        statistics.record(first, losses[first : first + 16].astype(np.float32))
    kept = statistics.select(1)
    return set(kept(np.arange(kept.count)).tolist())


def test_a_running_mean_takes_off_how_early_a_sequence_came(tmp_path: Path) -> None:
    """As published, what came early stays; less the mean around it, what is hard does."""
    hard = set(range(1, TOTAL, 2))
    as_published = _chosen(tmp_path / "published")
    assert len(as_published & hard) < 0.7 * len(hard)
    better = _chosen(
        tmp_path / "better", staleness="subtract_running_mean", running_mean_sequences=50
    )
    assert len(better & hard) > 0.95 * len(hard)


def test_each_window_has_its_own_mean() -> None:
    """In the order of training; what is not finite stays so, and counts for no mean."""
    schedule = ReviewSchedule(ReviewSection(), 10)
    order = schedule.order([10], "f", 3)
    one, numbers = schedule.passes[0], order.numbers(0, 10)
    losses = np.zeros(10, np.float32)
    losses[numbers] = [1, 2, 3, np.inf, 4, 5, np.nan, np.nan, 7, 9]
    found = without_running_mean(losses, one, order, 4)[numbers]
    np.testing.assert_allclose(found, [-1, 0, 1, np.inf, -0.5, 0.5, np.nan, np.nan, -1, 1])


def test_a_sequence_without_targets_stays_below_all_others() -> None:
    """It has no loss, so none is taken off and it counts for no mean; whatever is around it."""
    schedule = ReviewSchedule(ReviewSection(), 8)
    order = schedule.order([8], "f", 3)
    one, numbers = schedule.passes[0], order.numbers(0, 8)
    losses = np.zeros(8, np.float32)
    losses[numbers] = [8, 6, 7, 0, 1, 0, 0, 3]
    found = without_running_mean(losses, one, order, 4)[numbers]
    np.testing.assert_allclose(found, [1, -1, 0, -np.inf, -1, -np.inf, -np.inf, 1])


def test_sequences_without_targets_go_first_and_are_not_called_infinite(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the mean around the others is far higher than around them."""
    phases = (ReviewPhase(name="learn"), ReviewPhase(name="focus", drop_percent=25.0))
    section = ReviewSection(
        phases=phases, staleness="subtract_running_mean", running_mean_sequences=4
    )
    schedule = ReviewSchedule(section, 8)
    order = schedule.order([8], "f", 3)
    statistics = Statistics(tmp_path, section, schedule, order)
    statistics.restore(None, 0)
    statistics.record(0, np.array([9, 1, 9, 9, 2, 0, 2, 0], np.float32))
    kept = statistics.select(1)
    gone = set(range(8)) - set(kept(np.arange(kept.count)).tolist())
    assert gone == set(order.numbers(0, 8)[[5, 7]].tolist())
    assert "not finite" not in caplog.text


@pytest.mark.parametrize(("percent", "read"), [(100.0, 101), (50.0, 51), (0.1, 1)])
def test_so_many_sequences_are_read_again(percent: float, read: int) -> None:
    """Those that came first in the epoch that judges; before choices and no other phase."""
    section = ReviewSection(staleness="rescore", rescore_percent=percent)
    schedule = ReviewSchedule(section, 101)
    again = [schedule.rescored(phase) for phase in range(4)]
    assert again[0] is again[2] is None
    for found, judge in ((again[1], schedule.passes[0]), (again[3], schedule.passes[2])):
        assert found is not None
        assert (found.first_sample, found.size) == (judge.first_sample, read)
    assert "read again, forward only" in schedule.lines(16, 128)[2]
    assert all(ReviewSchedule(ReviewSection(), 101).rescored(phase) is None for phase in range(4))


def test_settings_of_another_remedy_are_said_to_have_no_effect() -> None:
    """Only those that were given."""
    assert ReviewSection().without_effect() == []
    assert ReviewSection(staleness="rescore", rescore_percent=5.0).without_effect() == []
    assert ReviewSection(rescore_percent=5.0, running_mean_sequences=9).without_effect() == [
        "data.review.running_mean_sequences=9: data.review.staleness=none",
        "data.review.rescore_percent=5.0: data.review.staleness=none",
    ]
