"""Up to which loss a step is believed: a robust bound from the losses before it."""

import statistics
from collections.abc import Sequence

# Standard deviations of a normal distribution in its median absolute deviation.
_SIGMA_OF_MAD = 1.4826
# A loss that hardly varies must not make a spike of its next digit.
_LEAST_SIGMA = 0.005


def loss_limit(losses: Sequence[float], *, sigmas: float, window: int) -> float:
    """The median of the last losses, and so many robust standard deviations above it.

    Median and median absolute deviation do not follow a few wild values, as mean and standard
    deviation do. While less than half a window is known there is no limit.

    Args:
        losses: of the steps that were taken, newest last; the last `window` count.
        sigmas: how many standard deviations; one is at least 0.5 % of the median.
        window: how many losses are looked back upon.

    Returns:
        The limit; infinity for none.

    Example: losses 2.0, 2.1, 1.9, 2.2, 1.8 have the median 2.0 and deviate by 0.1 in the median, so
    that 6 sigmas end at 2.0 + 6 * 0.14826 = 2.89.
    """
    last = losses[-window:]
    if 2 * len(last) < window:
        return float("inf")
    median = statistics.median(last)
    deviation = statistics.median(abs(loss - median) for loss in last)
    return median + sigmas * max(_SIGMA_OF_MAD * deviation, _LEAST_SIGMA * abs(median))
