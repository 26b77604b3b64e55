"""What the phases of `data.review` come to in sequences, steps and tokens."""

from pathlib import Path

import pytest

from model.errors import ConfigError
from pipeline.config.review_section import ReviewPhase, ReviewSection
from pipeline.config.run_config import load_config
from pipeline.review.schedule import ReviewSchedule, dropped_by, with_steps


def _schedule(sequences: int = 101) -> ReviewSchedule:
    return ReviewSchedule(ReviewSection(), sequences)


def test_the_published_schedule_is_four_times_the_data() -> None:
    """1 + 0.5 + 1 + 5 * 0.3, each share rounded so that floor(N s / 100) go."""
    schedule = _schedule(1000)
    assert [one.size for one in schedule.passes] == [1000, 500, 1000, *[300] * 5]
    assert schedule.passes[-1].end == 4000
    assert [one.size for one in _schedule(101).passes] == [101, 51, 101, *[31] * 5]


def test_shares_are_decimal_numbers() -> None:
    """0.1 % of 1,000 is 1, and 70 % of 10 is 7, whatever binary fractions make of it."""
    assert dropped_by(ReviewPhase(name="f", drop_percent=0.1), 1000) == 1
    assert dropped_by(ReviewPhase(name="f", drop_percent=70.0), 10) == 7
    assert dropped_by(ReviewPhase(name="f", drop_percent=29.0), 100) == 29


@pytest.mark.parametrize("batch", [1, 4, 16, 101, 1000])
def test_steps_are_those_that_the_order_makes(batch: int) -> None:
    """Steps walked one by one are as many as were said, in all and in each phase."""
    schedule = _schedule()
    order = schedule.order([101], "", 0)
    sample, by_phase = 0, [0] * 4
    while sample < order.end:
        by_phase[order.pass_at(sample).phase] += 1
        sample = order.step_end(sample, batch)
    assert schedule.steps(batch) == sum(by_phase)
    assert [schedule.steps(batch, phase) for phase in range(4)] == by_phase


def test_a_phase_is_judged_by_the_last_one_that_had_all() -> None:
    """L9: phase 4 by the records of phase 3 alone, phase 2 by those of phase 1."""
    schedule = _schedule()
    assert [one.phase for one in schedule.judges(1)] == [0]
    assert [one.phase for one in schedule.judges(3)] == [2]


def test_steps_follow_or_have_to_agree(config: Path) -> None:
    """Left out they are filled in; another number is refused with the right one."""
    free = load_config(config, ["train.steps=null", "data.review={}"])
    filled = with_steps(free, _schedule(), 16)
    needed = _schedule().steps(16)
    assert filled.steps == needed
    assert filled.data.review == ReviewSection()
    given = load_config(config, ["data.review={phases: published}"])
    with pytest.raises(ConfigError, match=f"train.steps=12, .* comes to {needed} steps of 16"):
        with_steps(given, _schedule(), 16)
    late = load_config(config, ["train.steps=null", "data.review={}", "train.stop_at_step=999"])
    with pytest.raises(ConfigError, match="stop_at_step=999 is past"):
        with_steps(late, _schedule(), 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.steps=null"], "train.steps=null is empty, must be a whole number"),
        (["data.review={phases: []}"], "must begin with a phase over all sequences"),
        (["data.review={phases: lfr}"], "is not a schedule; write published"),
        (["data.review={}", "data.weights={a: 1}"], "data.weights cannot be used with data.review"),
        (["data.review={}", "train.on_spike=rollback"], "train.on_spike=rollback cannot be used"),
        (["data.review={}", "train.head_backward=joint"], "gives no loss for each sequence"),
    ],
)
def test_what_does_not_go_together_is_refused(
    config: Path, settings: list[str], message: str
) -> None:
    """One line each, with the way out."""
    with pytest.raises(ConfigError, match=message):
        load_config(config, settings)
