"""Damaged files of a review: refused in a line, before anything of the run is touched."""

import json
from pathlib import Path

import numpy as np
import pytest

from model.errors import CheckpointError, ConfigError
from pipeline.config.review_section import ReviewPhase, ReviewSection
from pipeline.review.files import read_losses
from pipeline.review.profile import epochs_of
from pipeline.review.review import Review
from pipeline.review.schedule import ReviewSchedule
from pipeline.review.statistics import Statistics
from tests.support.harness import run_ranks

TOTAL = 40
FIRST, KEPT = "losses_epoch_01.npy", "kept_phase_2.npy"
PHASES = (ReviewPhase(name="learn"), ReviewPhase(name="focus", drop_percent=50.0, repetitions=2))
DAMAGE = {
    "empty": b"",
    "cut": b"\x93NUMPY",
    "header": b"\x93NUMPY\x01\x00\x08\x00{'descr\n",
    "archive": b"PK\x03\x04 and no more",
    "text": b"no array at all",
}


def _statistics(folder: Path) -> Statistics:
    section = ReviewSection(phases=PHASES)
    schedule = ReviewSchedule(section, TOTAL)
    return Statistics(folder, section, schedule, schedule.order([TOTAL], "f", 3))


def _reviewed(folder: Path) -> tuple[Path, Path]:
    """A run that is within its third epoch, and its checkpoint."""
    run_dir, checkpoint = folder / "run", folder / "checkpoint"
    statistics = _statistics(run_dir)
    statistics.restore(None, 0)
    statistics.record(0, np.arange(1, TOTAL + 1, dtype=np.float32))
    statistics._order.keep(1, statistics.select(1))
    statistics.record(TOTAL, np.ones(TOTAL // 2 + 5, np.float32))
    checkpoint.mkdir()
    statistics.files()(checkpoint)
    return run_dir, checkpoint


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_no_array_is_told(tmp_path: Path, damage: str) -> None:
    """Whatever numpy makes of it."""
    path = tmp_path / FIRST
    path.write_bytes(DAMAGE[damage])
    with pytest.raises(OSError, match="is no array"):
        read_losses(path, TOTAL)


@pytest.mark.parametrize(
    "other", [np.zeros(TOTAL - 1, np.float32), np.zeros(TOTAL), np.float32(1.0)]
)
def test_another_array_is_told(tmp_path: Path, other: np.ndarray) -> None:
    """Of another length, kind or shape."""
    np.save(tmp_path / FIRST, other)
    with pytest.raises(OSError, match="is no array of 40 float32"):
        read_losses(tmp_path / FIRST, TOTAL)


@pytest.mark.parametrize("name", [FIRST, KEPT, "losses_epoch_03.npy"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_checkpoint_leaves_the_run_as_it_is(
    tmp_path: Path, name: str, damage: str
) -> None:
    """Its files may be the only whole ones that are left."""
    run_dir, checkpoint = _reviewed(tmp_path)
    before = {path.name: path.read_bytes() for path in (run_dir / "review").iterdir()}
    (checkpoint / "review" / name).unlink()
    if damage == "cut":
        (checkpoint / "review" / name).write_bytes(DAMAGE["cut"])
    with pytest.raises(CheckpointError, match=f"{name}.*use another checkpoint"):
        _statistics(run_dir).restore(checkpoint, TOTAL + TOTAL // 2 + 5)
    assert {path.name: path.read_bytes() for path in (run_dir / "review").iterdir()} == before


def test_a_whole_checkpoint_goes_on(tmp_path: Path) -> None:
    """The other side of the test above: the same files, whole."""
    run_dir, checkpoint = _reviewed(tmp_path)
    statistics = _statistics(run_dir)
    statistics.restore(checkpoint, TOTAL + TOTAL // 2 + 5)
    assert {path.name for path in (run_dir / "review").glob("*.npy")} == {
        *(FIRST, KEPT, "losses_epoch_02.npy")
    }


@pytest.mark.parametrize("name", [FIRST, "index.json"])
def test_a_report_says_what_is_damaged(tmp_path: Path, name: str) -> None:
    """Not that there are too few epochs."""
    run_dir, _ = _reviewed(tmp_path)
    assert len(epochs_of(run_dir)) == 2
    (run_dir / "review" / name).unlink()
    np.save(run_dir / "review" / FIRST, np.zeros(3, np.float32))
    if name == "index.json":
        (run_dir / "review" / name).write_text(json.dumps([1]))
    with pytest.raises(ConfigError, match=f"is damaged .*{name}"):
        epochs_of(run_dir)


def _raised_by_this_rank() -> str:
    """What a rank raises when rank 0 finds a checkpoint without its losses."""
    review = Review.__new__(Review)
    review._statistics = _statistics(Path("unused"))
    with pytest.raises(CheckpointError) as raised:
        review._on_main(lambda: review._statistics.restore(Path("gone"), TOTAL))
    return str(raised.value)


def test_every_rank_raises_what_rank_0_found() -> None:
    """So that none waits for the others until the time limit."""
    found = run_ranks(2, _raised_by_this_rank, timeout_s=60.0)
    assert found[0] == found[1]
    assert found[0].startswith("gone has no review/losses_epoch_01.npy")
