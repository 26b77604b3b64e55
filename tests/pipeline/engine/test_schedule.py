"""Learning-rate schedules at their corners."""

from itertools import pairwise

import pytest

from pipeline.config.sections import ScheduleSection
from pipeline.engine.schedule import learning_rate

COSINE = ScheduleSection(kind="cosine", warmup_steps=10, final_ratio=0.1)
LINEAR = ScheduleSection(kind="linear", warmup_steps=10, final_ratio=0.1)
WSD = ScheduleSection(kind="wsd", warmup_steps=10, final_ratio=0.1, decay_steps=20)


def rates(schedule: ScheduleSection, steps: int = 110) -> list[float]:
    """Rates of steps 0..steps at peak 2; the entry of step 0 is unused."""
    return [
        0.0,
        *(
            learning_rate(s, schedule=schedule, peak=2.0, total_steps=steps)
            for s in range(1, steps + 1)
        ),
    ]


@pytest.mark.parametrize("schedule", [COSINE, LINEAR, WSD], ids=lambda s: s.kind)
def test_warm_up_peak_and_end(schedule: ScheduleSection) -> None:
    """The first step has a tenth of the peak, step 10 the peak, the last the final ratio."""
    rate = rates(schedule)
    assert rate[1] == pytest.approx(0.2)
    assert rate[5] == pytest.approx(1.0)
    assert rate[10] == 2.0
    assert rate[110] == pytest.approx(0.2)
    assert max(rate) == 2.0
    assert all(later <= earlier for earlier, later in pairwise(rate[10:]))


def test_half_way_down() -> None:
    """Cosine and line are both half way at the middle of the decay; a quarter in they differ."""
    cosine, linear = rates(COSINE), rates(LINEAR)
    assert cosine[60] == pytest.approx(1.1)
    assert linear[60] == pytest.approx(1.1)
    assert linear[35] == pytest.approx(0.2 + 1.8 * 0.75)
    assert cosine[35] == pytest.approx(0.2 + 1.8 * (1 + 0.5**0.5) / 2)


def test_wsd_holds_and_then_falls_along_a_line() -> None:
    """The peak holds until decay_steps before the end."""
    rate = rates(WSD)
    assert rate[10:91] == [2.0] * 81
    assert rate[91] == pytest.approx(2.0 - 1.8 / 20)
    assert rate[100] == pytest.approx(1.1)


def test_without_warm_up_the_first_step_is_near_the_peak() -> None:
    """warmup_steps 0 starts the decay at once."""
    schedule = ScheduleSection(kind="linear", warmup_steps=0, final_ratio=0.0)
    assert rates(schedule, 4)[1:] == [1.5, 1.0, 0.5, 0.0]


def test_past_the_end_the_final_rate_holds() -> None:
    """A step beyond the run has the final rate, not one that rises again."""
    assert learning_rate(500, schedule=COSINE, peak=2.0, total_steps=110) == pytest.approx(0.2)


def test_steps_count_from_one() -> None:
    """Step 0 is a programmer's fault."""
    with pytest.raises(AssertionError, match="count from 1"):
        learning_rate(0, schedule=COSINE, peak=1.0, total_steps=10)


def test_run_shorter_than_its_warm_up() -> None:
    """A short try of a long configuration stays on the warm-up's line to its last step."""
    schedule = ScheduleSection(kind="cosine", warmup_steps=20)
    for total in (5, 20):
        rate = learning_rate(5, schedule=schedule, peak=1.0, total_steps=total)
        assert rate == pytest.approx(0.25)
    assert learning_rate(20, schedule=schedule, peak=1.0, total_steps=20) == 1.0
