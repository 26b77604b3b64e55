"""The loader benchmark runs by path, on sets that the real reader accepts."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.synthetic_set import document_lengths, make_set
from data_prep.shards.shard_set import ShardSet

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.stress
def test_quick_run_prints_every_table(tmp_path: Path) -> None:
    """Rows, batches, cold reads, opening and packing are measured; README.md stays as it was."""
    readme = (ROOT / "benchmarks" / "README.md").read_text()
    command = [sys.executable, str(ROOT / "benchmarks" / "loader.py"), "--quick"]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path)],
        check=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    for line in (
        "sequences: this reader",
        "ShardSet.open |",
        "np.memmap |",
        "padding |",
        "10^12, ms |",
    ):
        assert line in done.stdout, done.stdout
    assert (ROOT / "benchmarks" / "README.md").read_text() == readme
    assert not list(tmp_path.iterdir())


def test_made_up_sets_are_sound(tmp_path: Path) -> None:
    """Checksums hold, also those of files with several names; documents end where they say."""
    make_set(tmp_path, shards=3, tokens=5000)
    shards = ShardSet.open(tmp_path, "train", verify=True)
    stream = shards.read(0, shards.num_tokens)
    assert len(stream) == 15_000
    ends = np.flatnonzero(stream == shards.eos_id)
    assert np.array_equal(np.cumsum(shards.document_lengths()) - 1, ends)
    assert document_lengths(5000, 0).sum() == 5000
