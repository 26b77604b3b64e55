"""The limit above which a loss is a spike."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.guard.loss_limit import loss_limit


def test_worked_example() -> None:
    """Median 2.0, median deviation 0.1."""
    losses = [2.0, 2.1, 1.9, 2.2, 1.8]
    assert loss_limit(losses, sigmas=6, window=5) == pytest.approx(2.0 + 6 * 0.14826)


def test_there_is_no_limit_before_half_a_window() -> None:
    """And from then on there is one."""
    assert loss_limit([2.0] * 4, sigmas=6, window=9) == math.inf
    assert loss_limit([2.0] * 5, sigmas=6, window=9) < math.inf


def test_only_the_window_counts() -> None:
    """Losses of long ago do not raise the limit."""
    assert loss_limit([9.0] * 50 + [1.0] * 10, sigmas=6, window=10) == pytest.approx(1.03)


@given(st.lists(st.floats(1.9, 2.1), min_size=21, max_size=21), st.floats(10, 1e30))
def test_a_third_of_wild_losses_does_not_lift_the_limit_to_them(
    losses: list[float], wild: float
) -> None:
    """A mean and a standard deviation would follow them."""
    found = loss_limit(losses + [wild] * 9, sigmas=8, window=30)
    assert found < 2.1 + 8 * 1.4826 * 0.2
