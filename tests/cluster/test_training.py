"""The real trainer under the job scripts, on a real Slurm: disturbed runs end as quiet ones."""

import json
import signal
import sys
from pathlib import Path

import pytest

from pipeline.launching.snapshot import SUBMISSIONS
from tests.cluster.jobs import submit_training
from tests.cluster.testbed import Cluster
from tests.support.training_runs import last_step, metrics_without_times, run_job

pytestmark = pytest.mark.cluster

START_S = 300  # ranks import their libraries on the cores that this machine really has


def _verdict(run_dir: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((run_dir / "verdict.json").read_text())
    return content


def test_submitted_run_trains_on_four_nodes(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    """`pipeline.submit` checks, copies and submits; the job runs the copy, and says it is done."""
    command = [sys.executable, "-m", "pipeline.submit", str(config), "--nodes", "4"]
    said = cluster.run(*command, "--ranks-per-node", "1", environment={"OMP_NUM_THREADS": "1"})
    copy = tmp_path / "run" / SUBMISSIONS / "0001"
    config.write_text("changed after the job was submitted")
    number = said.partition("job ")[2].split()[0]
    ended = ("JobState=COMPLETED", "JobState=FAILED")
    cluster.wait(
        lambda: any(state in cluster.run("scontrol", "show", "job", number) for state in ended),
        "the job has ended",
        START_S,
        poll_s=0.5,
    )
    log = (tmp_path / "run" / f"slurm-{number}.out").read_text()
    assert f"{copy}/config.yaml on 4 nodes x 1 processes" in log, log
    assert (_verdict(tmp_path / "run")["outcome"], last_step(tmp_path / "run")) == ("done", 12), log


@pytest.mark.stress
def test_a_folder_that_is_not_shared_is_refused(
    cluster: Cluster, config: Path, tmp_path: Path
) -> None:
    """On a node's own disk: before the first step, and the log ends with what to do."""
    local = cluster.local_folder / "run"
    job = submit_training(cluster, tmp_path, config, ["--nodes=2"], f"run.dir={local}")
    assert job.finish(START_S) == "FAILED"
    assert "set run.dir to a folder that all nodes share" in job.last_line
    assert job.last_line.startswith("error: rank 1: run.dir=")
    assert "step 1" not in job.log


@pytest.mark.stress
def test_a_node_with_another_file_is_refused(
    cluster: Cluster, config: Path, tmp_path: Path
) -> None:
    """A configuration that is another one on the second node: its rank is named, and the key."""
    local = cluster.local_folder / "config.yaml"
    copy = 'sed "s/seed: 7/seed: 7$SLURM_NODEID/" "$1" >"$2"'
    cluster.run("srun", "--nodes=2", "bash", "-c", copy, "bash", str(config), str(local))
    job = submit_training(cluster, tmp_path, local, ["--nodes=2"], "train.steps=9")
    assert job.finish(START_S) == "FAILED"
    assert "rank 1/2 on node2 has another configuration than rank 0 on node1" in job.log
    assert "run.seed is 71 there and 70 on rank 0" in job.last_line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.stress
def test_a_disturbed_run_is_the_undisturbed_one(
    cluster: Cluster, config: Path, tmp_path: Path
) -> None:
    """Warned, without power, killed and frozen: one job, whose metrics are those of a quiet run."""
    steps = ["train.steps=400", "checkpoint.every_steps=20", "eval.every_steps=100"]
    quiet = tmp_path / "quiet"
    outcome = run_job(
        tmp_path, [str(config), "--set", *steps, f"run.dir={quiet}"], world=2, timeout_s=600
    )
    assert outcome.codes == [0, 0], outcome.output
    job, run_dir = (
        submit_training(cluster, tmp_path, config, ["--nodes=2"], *steps),
        tmp_path / "run",
    )

    def reach(step: int) -> list[str]:
        """Wait for a step; the job's nodes."""
        cluster.wait(lambda: last_step(run_dir) >= step, f"step {step}\n{job.log}", START_S)
        names = cluster.run("scontrol", "show", "hostnames", job.field("NodeList"))
        return names.split()

    reach(30)
    job.signal("USR1")
    job.wait_for("run number 2", START_S)
    broken = reach(90)[1]
    cluster.crash(broken)
    job.wait_for("run number 3", START_S)
    cluster.boot(broken)  # two of four nodes are excluded below, and the job needs two
    nodes = reach(150)
    cluster.kill(nodes[1], "pipeline.train")
    job.wait_for("run number 4", START_S)
    nodes = reach(210)
    cluster.kill(nodes[1], "pipeline.train", number=signal.SIGSTOP)
    assert job.finish(2 * START_S) == "COMPLETED", job.log
    assert metrics_without_times(run_dir) == metrics_without_times(quiet)
