"""Learned, unlearned, forgotten: counted as the words say, from arrays of losses."""

from pathlib import Path

import numpy as np
import pytest

from model.errors import ConfigError
from pipeline.review import profile
from pipeline.review.profile import epochs_of, hardest_and_most_forgotten, profile_of

# A column is a sequence.
LOSSES = np.array(
    [
        # falls, rises, falls and rises, the same twice, not seen again, not a number at first
        [5.0, 1.0, 5.0, 5.0, 5.0, np.nan],
        [4.0, 2.0, 3.0, 3.0, -1.0, 4.0],
        [-1.0, 3.0, 4.0, 4.0, -1.0, 3.0],
        [3.0, 4.0, 4.5, 2.0, -1.0, 2.0],
        [2.0, 5.0, 4.6, 6.0, -1.0, 1.0],
    ],
    np.float32,
)


def test_each_kind_is_counted() -> None:
    """Five are seen twice; the third is forgotten once, the fourth twice, in two descents."""
    found = profile_of(list(LOSSES))
    assert found.sequences == 5
    assert (found.learned, found.unlearned) == (3, 2)
    assert (found.forgotten, found.forgotten_again) == (2, 1)
    assert found.descents == [1, 3, 1]
    assert found.forgotten_share == 0.4
    assert found.forgotten_again_share == 0.5


def test_parts_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same from two sequences at a time."""
    whole = profile_of(list(LOSSES))
    chosen = hardest_and_most_forgotten(list(LOSSES), 4)
    monkeypatch.setattr(profile, "_CHUNK", 2)
    assert profile_of(list(LOSSES)) == whole
    assert hardest_and_most_forgotten(list(LOSSES), 4) == chosen


def test_the_hardest_are_those_of_the_highest_last_loss() -> None:
    """Most forgotten: the fourth sequence twice, the third once; no other."""
    hardest, forgotten = hardest_and_most_forgotten(list(LOSSES), 3)
    assert hardest == [3, 1, 4]
    assert forgotten == [3, 2]


def test_a_run_without_epochs_is_refused(tmp_path: Path) -> None:
    """With what to give instead."""
    with pytest.raises(ConfigError, match="fewer than two epochs; give the folder of a run"):
        epochs_of(tmp_path)
