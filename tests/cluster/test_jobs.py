"""The job scripts on a real Slurm, with a trainer that starts at once (`trainer.py`).

What signals, limits, faults and options do to a job; that the real trainer goes on exactly where it
was is shown in `test_training.py`.
"""

import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.cluster.conftest import running
from tests.cluster.jobs import ROOT, Job, interpreter, light_run, trained_steps
from tests.cluster.settings import Settings
from tests.cluster.testbed import Cluster
from tests.cluster.trainer import LOST, TOLD
from tests.support.training_runs import run_job

pytestmark = pytest.mark.cluster
LONG = functools.partial(pytest.param, marks=pytest.mark.stress)

Pretrain = Callable[..., Job]


@pytest.fixture
def pretrain(cluster: Cluster, tmp_path: Path) -> Pretrain:
    """Submits `slurm/pretrain_7b.sh` with the light trainer, two processes on each of two nodes."""

    def submit(*options: str, **run: object) -> Job:
        return _submitted(cluster, tmp_path, ["--nodes=2", *options], **run)

    return submit


def _submitted(cluster: Cluster, folder: Path, options: Sequence[str], **run: object) -> Job:
    return Job(
        cluster,
        folder,
        "slurm/pretrain_7b.sh",
        options=options,
        arguments=[str(light_run(folder, **run))],
        PYTHON=interpreter(folder),
        RANKS_PER_NODE="2",
    )


def _assert_went_on(folder: Path, steps: int) -> None:
    """All steps were taken, and none but those since the newest checkpoint twice."""
    taken = trained_steps(folder)
    assert sorted(set(taken)) == list(range(1, steps + 1))


def test_a_job_without_the_callers_environment(
    cluster: Cluster, tmp_path: Path, pretrain: Pretrain
) -> None:
    """--export=NONE with a variable: configuration and tasks are what was asked for."""
    job = pretrain("--nodes=4", "--export=PYTHON")
    assert job.finish() == "COMPLETED", job.log
    assert trained_steps(tmp_path) == list(range(1, 31))
    assert "run.json on 4 nodes x 1 processes (node[1-4])" in job.log


def test_a_configuration_error_is_the_last_line(pretrain: Pretrain) -> None:
    """It was looked for before any task was started."""
    job = pretrain(problem="train.steps must be a number")
    assert job.finish() == "FAILED"
    assert job.last_line == "error: train.steps must be a number"
    assert job.field("ExitCode") == "2:0"
    assert "srun" not in job.log


def test_the_error_of_any_rank_is_the_last_line(tmp_path: Path, pretrain: Pretrain) -> None:
    """Also of one that is not on the first node; a fault of its own is not tried again."""
    job = pretrain(failing_rank=3)
    assert job.finish() == "FAILED"
    told = (tmp_path / "run" / TOLD).read_text()
    assert told == "failed rank 3: ValueError: a bug\n"  # once, whatever the other ranks said
    assert job.last_line == "error: rank 3: ValueError: a bug"
    assert job.field("Restarts") == "0"


def test_the_warning_of_the_time_limit_queues_again(tmp_path: Path, pretrain: Pretrain) -> None:
    """Saved, queued under the same number, and gone on; one log."""
    job = pretrain()
    job.wait_for_starts(1)
    job.signal("USR1")
    job.wait_for_starts(2)
    assert job.finish() == "COMPLETED", job.log
    _assert_went_on(tmp_path, 30)
    assert "is queued again and will go on where it stopped" in job.log


@pytest.mark.parametrize("wait_s", [0.6, *(LONG(s) for s in (0.1, 0.3, 1.0, 1.5, 2.0, 4.0))])
def test_a_warning_while_the_job_starts(
    cluster: Cluster, tmp_path: Path, pretrain: Pretrain, wait_s: float
) -> None:
    """Whenever it comes, the job is queued again and not failed."""
    job = pretrain(steps=80)  # which outlast the longest wait
    cluster.wait(lambda: job.state == "RUNNING", "the job runs", poll_s=0.02)
    # A signal that Slurm sends before there is a script reaches nobody.
    host = job.field("BatchHost")
    script = f"{cluster.folder}/spool/{host}/job{int(job.number):05d}/slurm_script"
    cluster.wait(lambda: cluster.processes_of(host, script), "the script runs", poll_s=0.02)
    time.sleep(wait_s)
    job.signal("USR1")
    cluster.wait(lambda: job.field("Restarts") == "1", f"a restart\n{job.log}", 60)
    assert job.finish() == "COMPLETED", job.log
    _assert_went_on(tmp_path, 80)


@pytest.mark.stress
def test_the_time_limit_itself(tmp_path: Path, pretrain: Pretrain) -> None:
    """Slurm's own warning, a minute's limit: the same number goes on."""
    job = pretrain("--time=1", "--signal=B:USR1@20", steps=700)
    job.wait_for("USR1: the time limit is near", 180)
    assert job.finish(240) == "COMPLETED", job.log
    assert job.field("Restarts") != "0"
    _assert_went_on(tmp_path, 700)


def test_cancelling_ends_the_job(pretrain: Pretrain) -> None:
    """Nothing is queued again, and the log says how to go on."""
    job = pretrain(steps=3000)
    job.wait_for_starts(1)
    job._cluster.run("scancel", job.number)
    assert job.finish() == "CANCELLED"
    job.wait_for("stopped on request; the same sbatch command goes on")
    assert len(job.starts) == 1


@pytest.mark.parametrize("partition", ["main", "graced"])
def test_a_preempted_job_goes_on_by_itself(
    cluster: Cluster, tmp_path: Path, pretrain: Pretrain, partition: str
) -> None:
    """With and without a time of grace, and nobody is told to submit it again."""
    job = pretrain(f"--partition={partition}", steps=60)
    job.wait_for_starts(1)
    urgent = ["sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null"]
    cluster.run(*urgent, "--wrap=sleep 1")
    job.wait_for_starts(2)
    assert job.finish() == "COMPLETED", job.log
    _assert_went_on(tmp_path, 60)
    assert "the same sbatch command" not in job.log
    assert "goes on by itself" in job.log or "is being preempted" in job.log


@pytest.mark.stress
def test_a_requeue_by_hand_goes_on(cluster: Cluster, tmp_path: Path, pretrain: Pretrain) -> None:
    """`scontrol requeue` is Slurm's own, and the log says so."""
    job = pretrain()
    job.wait_for_starts(1)
    cluster.run("scontrol", "requeue", job.number)
    job.wait_for_starts(2)
    assert job.finish() == "COMPLETED", job.log
    assert "the same sbatch command" not in job.log


def test_a_killed_task_costs_its_node(cluster: Cluster, tmp_path: Path, pretrain: Pretrain) -> None:
    """The job goes on without the node where a task was killed."""
    job = pretrain(steps=60)
    job.wait_for_starts(1)
    assert job.starts == ["node[1-2]"]
    cluster.wait(lambda: len(trained_steps(tmp_path)) > 12, "a checkpoint")
    cluster.kill("node2", "tests.cluster.trainer")
    job.wait_for_starts(2)
    assert "node2" not in job.starts[1] + job.field("NodeList")
    assert job.finish() == "COMPLETED", job.log
    _assert_went_on(tmp_path, 60)
    told = (tmp_path / "run" / TOLD).read_text()
    assert told.split() == ["done"]  # not of the start that was queued again
    assert "a task on node2 was killed" in job.log
    assert "node2 is excluded from the next start" in job.log


@pytest.mark.stress
def test_a_node_that_is_needed_is_not_excluded(
    cluster: Cluster, tmp_path: Path, pretrain: Pretrain
) -> None:
    """A job that needs all nodes would wait forever without one."""
    job = pretrain("--nodes=4")
    job.wait_for_starts(1)
    cluster.kill("node2", "tests.cluster.trainer")
    job.wait_for_starts(2)
    assert job.finish() == "COMPLETED", job.log
    assert "node2 is not excluded" in job.log


@pytest.mark.stress
def test_exclusions_leave_a_node_to_spare(
    cluster: Cluster, tmp_path: Path, pretrain: Pretrain
) -> None:
    """Of four nodes a job of two leaves out one, the latest, besides what sbatch was told."""
    job = pretrain(steps=60)
    job.wait_for_starts(1)
    cluster.kill("node2", "tests.cluster.trainer")
    job.wait_for_starts(2)
    latest = _second_node(cluster, job.starts[1])
    cluster.wait(lambda: len(trained_steps(tmp_path)) > 25, "steps of the second start")
    cluster.kill(latest, "tests.cluster.trainer")
    job.wait_for_starts(3)
    assert "node2 is not excluded any more" in job.log
    assert job.field("ExcNodeList") == latest
    assert job.finish() == "COMPLETED", job.log
    _assert_went_on(tmp_path, 60)


@pytest.mark.stress
def test_a_node_that_sbatch_excludes_stays_out(
    cluster: Cluster, tmp_path: Path, pretrain: Pretrain
) -> None:
    """Whatever is lost later; what is left then are the two nodes that the job needs."""
    job = pretrain("--exclude=node1", steps=60)
    job.wait_for_starts(1)
    assert job.starts == ["node[2-3]"]
    cluster.kill("node3", "tests.cluster.trainer")
    job.wait_for_starts(2)
    assert job.starts[1] == "node[2,4]"
    assert job.field("ExcNodeList") == "node1,node3"
    assert job.finish() == "COMPLETED", job.log


def _second_node(cluster: Cluster, listed: str) -> str:
    return cluster.run("scontrol", "show", "hostnames", listed).split()[1]


@pytest.mark.stress
def test_a_killed_srun_is_started_again(
    cluster: Cluster, tmp_path: Path, pretrain: Pretrain
) -> None:
    """The launcher's death is no fault of the run's."""
    job = pretrain(steps=60)
    job.wait_for_starts(1)
    cluster.kill("node1", "srun")
    job.wait_for_starts(2)
    assert job.finish() == "COMPLETED", job.log
    _assert_went_on(tmp_path, 60)


@pytest.mark.parametrize("node", [LONG("node1"), "node2"])
def test_a_power_cut_moves_the_job(
    cluster: Cluster, tmp_path: Path, pretrain: Pretrain, node: str
) -> None:
    """The node of the batch script or another: the job goes on elsewhere."""
    job = pretrain(steps=60)
    job.wait_for_starts(1)
    cluster.crash(node)
    job.wait_for_starts(2, timeout_s=90)
    assert node not in job.starts[1]
    assert job.finish() == "COMPLETED", job.log
    _assert_went_on(tmp_path, 60)


@pytest.mark.stress
def test_a_job_without_progress_stops_with_the_reason(cluster: Cluster, pretrain: Pretrain) -> None:
    """Three starts of its own without a new checkpoint are enough; preemptions would not count."""
    job = pretrain(steps=3000, saves=False)
    for number in range(1, 5):
        job.wait_for_starts(number)
        job.signal("USR1")
    assert job.finish() == "FAILED"
    assert "queued again 3 times without progress (it is at: none)" in job.last_line


@pytest.mark.stress
def test_an_array_task_queues_only_itself(
    cluster: Cluster, tmp_path: Path, pretrain: Pretrain
) -> None:
    """The warning of one task leaves the others alone."""
    job = pretrain("--array=0-1", f"--output={tmp_path}/task_%a.txt")
    logs = [tmp_path / f"task_{task}.txt" for task in range(2)]
    cluster.wait(
        lambda: all(p.exists() and "start at" in p.read_text() for p in logs), "both tasks"
    )
    job._cluster.run("scancel", "--batch", "--signal=USR1", f"{job.number}_1")
    cluster.wait(lambda: not cluster.run("squeue", "--noheader"), "both tasks have ended", 90)
    assert [path.read_text().count("start at step") for path in logs] == [1, 2]


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        (["--gpus=h100:4"], "--gpus-per-node=2"),
        (["--gres=gpu:4"], "--gpus-per-node=4"),  # of a node that is given whole
        LONG(["--gpus-per-node=h100:2"], "--gpus-per-node=2"),
        LONG(["--ntasks-per-node=1", "--gres=gpu:h100:2"], "--gpus-per-node=2"),
        (["--chdir=/"], "--ntasks-per-node=2"),
    ],
)
def test_options_of_sbatch_reach_the_step(
    tmp_path: Path, pretrain: Pretrain, options: list[str], asked: str
) -> None:
    """However GPUs, tasks and the folder are asked for, the step is created and ends."""
    job = pretrain(*options, steps=3)
    assert job.finish() == "COMPLETED", job.log
    assert asked in job.log
    assert trained_steps(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize(
    ("script", "nodes"),
    [("slurm/pretrain_7b.sh", 4), ("slurm/shard_corpus.sh", 1), ("slurm/export.sh", 1)],
)
def test_slurm_takes_the_scripts_as_they_are(cluster: Cluster, script: str, nodes: int) -> None:
    """`sbatch --test-only` with eight typed GPUs a node, and one more than a node has."""
    only = ["sbatch", "--test-only", f"--nodes={nodes}"]
    cluster.run(*only, "--gpus-per-node=h100:8", str(ROOT / script))
    with pytest.raises(AssertionError, match="Requested node configuration is not available"):
        cluster.run(*only, "--gpus-per-node=h100:9", str(ROOT / script))


def test_shards_are_made_by_a_job(cluster: Cluster, tmp_path: Path) -> None:
    """The real shard command, its arguments behind the script, without the caller's environment."""
    corpus, output = tmp_path / "corpus.jsonl", tmp_path / "set"
    corpus.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(50)))
    job = Job(
        cluster,
        tmp_path,
        "slurm/shard_corpus.sh",
        options=["--export=PYTHON"],
        arguments=["--input", str(corpus), "--output", str(output), "--tokenizer", "bytes"],
        PYTHON=sys.executable,
    )
    assert job.finish(240) == "COMPLETED", job.log
    assert json.loads((output / "manifest.json").read_text())["totals"]["documents"] == 50


def test_a_run_is_exported_by_a_job(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    """The real export command on one node, with a log that says where the model is."""
    assert run_job(tmp_path, [str(config), "--set", "train.stop_at_step=3"]).codes == [0]
    job = Job(
        cluster,
        tmp_path,
        "slurm/export.sh",
        options=["--export=PYTHON"],
        arguments=[str(tmp_path / "run"), str(tmp_path / "export")],
        PYTHON=sys.executable,
    )
    assert job.finish(240) == "COMPLETED", job.log
    assert json.loads((tmp_path / "export" / "config.json").read_text())["hidden_size"] == 32
    assert list((tmp_path / "export").glob("*.safetensors")), job.log


@pytest.fixture
def patient() -> Iterator[Cluster]:
    """Four nodes that may be silent for as long as Slurm's own default has it."""
    yield from running(Settings(slurmd_timeout_s=300))


@pytest.mark.stress
def test_a_node_that_slurm_has_not_missed_yet(patient: Cluster, tmp_path: Path) -> None:
    """The run notices first, and the job is queued again without the node."""
    job = _submitted(patient, tmp_path, ["--nodes=2"], steps=60)
    job.wait_for_starts(1)
    patient.crash("node2")
    (tmp_path / "run" / LOST).write_text("node2")
    patient.wait(lambda: job.field("Restarts") == "1", f"a restart\n{job.log}", 240)
    job.wait_for("node2 is excluded from the next start")
    # Slurm holds the job until it takes the node for down; this spares the test the time.
    patient.run("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    job.wait_for_starts(2)
    assert "node2" not in job.starts[1] + job.field("NodeList")
    assert job.finish() == "COMPLETED", job.log


@pytest.mark.stress
def test_a_node_where_no_task_can_be_started(patient: Cluster, tmp_path: Path) -> None:
    """Its daemon is gone, and Slurm does not know yet: the job does not end, it leaves the node."""
    patient.kill("node2", "slurmd")
    job = _submitted(patient, tmp_path, ["--nodes=2"], steps=60)
    patient.wait(lambda: job.field("Restarts") == "1", f"a restart\n{job.log}", 120)
    job.wait_for("node2 is excluded from the next start")
    assert "a task on node2 was killed or could not be started" in job.log
    # As above; an allocation with node2 is not cleared before Slurm takes the node for down.
    patient.run("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    assert job.finish() == "COMPLETED", job.log
    assert "node2" not in job.starts[-1]
    _assert_went_on(tmp_path, 60)
