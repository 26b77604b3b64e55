"""The verdict on a run: written once for each start, by who knows it first."""

import json
from pathlib import Path

import pytest

from pipeline.guard.stall import Place
from pipeline.guard.stall import verdict as stall_verdict
from pipeline.launching.verdict import VERDICT_NAME, Verdict, blamed_host
from tests.support.training_runs import run_job

SLURM = {"SLURM_JOB_ID": "4711"}


def _content(run_dir: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((run_dir / VERDICT_NAME).read_text())
    return content


def test_the_first_rank_is_heard(tmp_path: Path) -> None:
    """What other ranks of the same start say afterwards is a consequence."""
    Verdict(tmp_path, SLURM, rank=3).record("failed", "a bug", exit_code=1, host="node2")
    Verdict(tmp_path, SLURM, rank=0).record("lost", "rank 3 is gone", exit_code=1)
    found = _content(tmp_path)
    assert (found["outcome"], found["rank"], found["host"]) == ("failed", 3, "node2")
    assert found["start"] == "4711.0"
    assert [path.name for path in tmp_path.iterdir()] == [VERDICT_NAME]


def test_the_next_start_has_a_verdict_of_its_own(tmp_path: Path) -> None:
    """A job that was queued again replaces what its earlier start left."""
    Verdict(tmp_path, SLURM, rank=3).record("lost", "node2 is gone", exit_code=1)
    again = Verdict(tmp_path, SLURM | {"SLURM_RESTART_COUNT": "1"}, rank=0)
    again.record("done", "done at step 3 of 3", exit_code=0)
    assert (_content(tmp_path)["start"], _content(tmp_path)["outcome"]) == ("4711.1", "done")
    Verdict(tmp_path, SLURM | {"SLURM_RESTART_COUNT": "2"}, rank=0).clear()
    assert not list(tmp_path.iterdir())


def test_a_verdict_is_a_key_in_each_line(tmp_path: Path) -> None:
    """Shell scripts read it by line, so a message of several lines becomes one."""
    Verdict(tmp_path, SLURM, rank=0).record("refused", 'no "shards"\nin x', exit_code=2)
    lines = (tmp_path / VERDICT_NAME).read_text().splitlines()
    assert ' "message": "no \\"shards\\" in x",' in lines
    assert ' "outcome": "refused",' in lines


def test_a_folder_that_cannot_be_written_is_no_further_error(tmp_path: Path) -> None:
    """The run ends for its own reason, not for the verdict's."""
    (tmp_path / "file").touch()
    Verdict(tmp_path / "file", SLURM, rank=0).record("failed", "a bug", exit_code=1)


@pytest.mark.parametrize(
    ("message", "host"),
    [
        ("rank 1/2 has died; its last sign of life was in step 3 (process 77 on node2)", "node2"),
        ("rank 3/8 (process 12, 13 on gpu-a.b) ended before all ranks had joined", "gpu-a.b"),
        ("rank 0 or its launcher has died: the job's store does not answer", None),
    ],
)
def test_messages_that_blame_a_process_name_its_node(message: str, host: str | None) -> None:
    """The node is found in the words of the watchdog and of the meeting."""
    assert blamed_host(message) == host


def test_a_hanging_rank_is_found_in_the_words_of_its_watch() -> None:
    """The late rank's node, also behind others of the message; none when all wait alike."""
    waiting = Place("rank 0/2 (stage 0, tp 0, dp 0)", "node1", 7, "step", 90.0, "a.py:1 (f)", "x")
    late = waiting._replace(rank="rank 1/2 (stage 0, tp 0, dp 1)", host="node2", collective=None)
    assert blamed_host(stall_verdict([waiting, late], 60.0, 5)) == "node2"
    assert blamed_host(stall_verdict([waiting, waiting], 60.0, 0)) is None


def test_runs_leave_their_verdict(config: Path, tmp_path: Path) -> None:
    """Done, refused, and done again by the same parent: each time the file is of the last start."""
    run_dir = tmp_path / "run"
    assert run_job(tmp_path, [str(config), "--set", "train.steps=3"], world=2).codes == [0, 0]
    found = _content(run_dir)
    assert (found["outcome"], found["step"], found["exit_code"]) == ("done", 3, 0)
    small = ["train.steps=3", "data.shards=/nonexistent"]
    outcome = run_job(tmp_path, [str(config), "--set", *small], world=2)
    assert outcome.codes == [2, 2]
    found = _content(run_dir)
    assert (found["outcome"], found["exit_code"]) == ("refused", 2)
    assert [f"error: {found['message']}"] == outcome.errors
    assert run_job(tmp_path, [str(config), "--set", "train.steps=4"], world=2).codes == [0, 0]
    assert _content(run_dir)["outcome"] == "done"
