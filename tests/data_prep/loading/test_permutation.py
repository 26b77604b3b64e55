"""The keyed permutation."""

import numpy as np
import pytest

from data_prep.loading.permutation import Permutation


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 255, 1000, 65_537, 100_003])
def test_it_is_a_bijection(size: int) -> None:
    """Every index is hit exactly once, at sizes around and between powers of two."""
    positions = Permutation(size, "f", seed=1, epoch=0)(np.arange(size))
    assert np.array_equal(np.sort(positions), np.arange(size))


def test_it_is_a_pure_function_of_its_key() -> None:
    """Equal keys give equal orders, in any batching; each part of the key changes the order."""
    every = np.arange(5000)
    positions = Permutation(5000, "f", 1, 0)(every)
    assert np.array_equal(positions, Permutation(5000, "f", 1, 0)(every))
    one_by_one = [int(Permutation(5000, "f", 1, 0)(every[i : i + 1])[0]) for i in range(50)]
    assert one_by_one == positions[:50].tolist()
    for other in (("g", 1, 0), ("f", 2, 0), ("f", 1, 1)):
        assert np.mean(Permutation(5000, *other)(every) == positions) < 0.01


def test_it_mixes() -> None:
    """Mean displacement is the third of the size that a random order has (within 2 %)."""
    size = 100_003
    every = np.arange(size)
    displacement = np.abs(Permutation(size, "f", 3, 0)(every) - every).mean() / size
    # The standard error of the mean over 1e5 indices is 0.0007.
    assert abs(displacement - 1 / 3) < 0.0067


def test_it_reaches_sizes_no_table_could_hold() -> None:
    """At 2^40 items single indices still map inside, and distinct ones stay distinct."""
    size = (1 << 40) - 3
    indices = np.array([0, 1, 2, size // 2, size - 1])
    positions = Permutation(size, "f", 1, 0)(indices)
    assert len(set(positions.tolist())) == 5
    assert 0 <= positions.min() <= positions.max() < size
