"""Losses without what the model's age has to do with them.

In a first epoch a sequence's loss says when it came as much as how hard it is.
"""

import numpy as np
from numpy.typing import NDArray

from data_prep.loading.review_order import Pass, ReviewOrder


def without_running_mean(
    losses: NDArray[np.float32], one: Pass, order: ReviewOrder, window: int
) -> NDArray[np.float32]:
    """Each loss less the mean of its window of the epoch, in the order of training.

    Windows follow each other and do not overlap; the last one may be shorter. Losses that are not
    finite count for no mean, nor does 0, which a sequence with too few targets has: it stays below
    all others, whatever the mean around it.

    Args:
        losses: `[sequences]` of an epoch over all of them.
        one: the epoch.
        order: of the run's samples.
        window: sequences of a window.
    """
    result = np.empty_like(losses)
    for first in range(one.first_sample, one.end, window):
        numbers = order.numbers(first, min(window, one.end - first))
        now = losses[numbers].astype(np.float64)
        known = now[np.isfinite(now) & (now > 0)]
        less = now - (known.mean() if len(known) else 0.0)
        result[numbers] = np.where(now == 0, -np.inf, less)
    return result
