"""The benchmark of data.review goes through the phases of a run and measures each."""

from pathlib import Path

from benchmarks.review import measure


def test_every_phase_is_measured(tmp_path: Path) -> None:
    """Four epochs, two choices, a checkpoint and a resume; so many samples each."""
    rows = measure(tmp_path, 9000)
    assert [samples for _, samples, _ in rows if samples] == [9000, 4500, 9000, 2700]
    assert sum("choose" in what for what, _, _ in rows) == 2
    assert [what for what, _, _ in rows][-3:] == [
        "checkpoint within an epoch",
        "resume from it",
        "profile of 4 epochs",
    ]
    assert all(cost.cpu_s >= 0 and cost.wall_s > 0 for _, _, cost in rows)
    names = [sorted(p.name for p in path.glob("*.npy")) for path in tmp_path.glob("*/review")]
    assert len(names) == 3  # of the run, the checkpoint and the resumed run
    assert all(set(n[:2]) >= {"kept_phase_2.npy", "kept_phase_4.npy"} for n in names)
