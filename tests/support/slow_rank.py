"""`pipeline.train`, with rank 1 slowed down in every step, as a hot or shared node would be."""

import os
import time
from collections.abc import Sequence
from typing import Any

from pipeline.guard import straggler

SLOWED_BY_S = 0.3


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, with windows that are short enough for a test."""
    import pipeline.job  # noqa: F401  # libraries in the trainer's order
    from pipeline import train
    from pipeline.engine.single_stage import SingleStage

    straggler.WINDOW_S = 0.5
    whole_step = SingleStage.run

    def slowed(self: SingleStage, *step: Any) -> Any:
        compute(SLOWED_BY_S)
        return whole_step(self, *step)

    if os.environ["RANK"] == "1":
        setattr(SingleStage, "run", slowed)  # noqa: B010
    return train.main(arguments)


def compute(seconds: float) -> None:
    """Keep this thread busy, or ready, for so long."""
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        pass
