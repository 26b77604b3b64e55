"""Learning rate as a pure function of the step, so that a resumed run cannot drift."""

import math

from pipeline.config.sections import ScheduleSection


def learning_rate(step: int, *, schedule: ScheduleSection, peak: float, total_steps: int) -> float:
    """Learning rate of one optimizer step.

    Linear warm-up reaches the peak at step `warmup_steps`; then the rate falls from the peak to
    `final_ratio * peak`, which it has at `total_steps`: along half a cosine, along a line, or (wsd)
    it stays at the peak and falls along a line over the last `decay_steps` steps. Example with
    peak 1, warmup_steps 2, total_steps 6, linear to 0: 0.5, 1, 0.75, 0.5, 0.25, 0 for steps 1..6.

    Args:
        step: The update it is for; the first is 1. Past `total_steps` the final rate holds.
        schedule: Kind and extents.
        peak: Highest rate.
        total_steps: Steps of the whole run, not of this part of it (train.steps, not
            train.stop_at_step).
    """
    assert step >= 1, f"steps count from 1, got {step}"
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    decay_start = schedule.warmup_steps
    if schedule.kind == "wsd":
        assert schedule.decay_steps is not None, "wsd needs decay_steps"
        decay_start = total_steps - schedule.decay_steps
    progress = min(max((step - decay_start) / (total_steps - decay_start), 0.0), 1.0)
    if schedule.kind == "cosine":
        share = (1.0 + math.cos(math.pi * progress)) / 2.0
    else:
        share = 1.0 - progress
    return peak * (schedule.final_ratio + (1.0 - schedule.final_ratio) * share)
