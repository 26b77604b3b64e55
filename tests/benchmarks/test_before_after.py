"""The comparison of two trees, on a tiny model and a tree with itself."""

import re
from pathlib import Path

import pytest

from benchmarks.before_after import Size, compare

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.stress
def test_a_tree_keeps_as_much_as_itself() -> None:
    """Both processes take their steps, and the line has times, ratio and bytes."""
    size = Size(layers=5, hidden_size=64, sequence=16, vocabulary=32)
    line = compare((ROOT, ROOT), size, "fp32", "cpu", rounds=2)
    numbers = re.fullmatch(
        r"fp32, cpu: \d+ -> \d+ ms, ratio (\d+\.\d+) \(quartiles .*\); "
        r"kept for backward (\d+) -> (\d+) MiB, 1\.00",
        line,
    )
    assert numbers is not None, line
    assert float(numbers[1]) > 0
    assert numbers[2] == numbers[3]
