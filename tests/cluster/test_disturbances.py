"""One disturbance each to a run of the real trainer: its metrics are those of a quiet run.

The runs are small ones on two nodes; what many of them in a row do, and how a job is submitted, is
in `test_training.py`.
"""

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.cluster.conftest import running
from tests.cluster.jobs import submit_training
from tests.cluster.settings import Settings
from tests.cluster.testbed import Cluster
from tests.pipeline.conftest import written_config
from tests.support.training_runs import last_step, metrics_without_times, run_job

pytestmark = [pytest.mark.cluster, pytest.mark.stress]

STEPS = ("train.steps=200", "checkpoint.every_steps=20", "eval.every_steps=100")
REACHED = 50  # the step at which runs are disturbed
START_S = 150  # ranks import their libraries on the cores that this machine really has
END_S = 300


@pytest.fixture(scope="module")
def quiet(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a run of two ranks that nothing disturbs, without Slurm."""
    return _quiet_run(shards, tmp_path_factory.mktemp("quiet"), world=2)


def _quiet_run(shards: Path, folder: Path, world: int, *settings: str) -> Path:
    config = written_config(shards, folder)
    arguments = [str(config), "--set", *STEPS, *settings]
    outcome = run_job(folder, arguments, world=world, timeout_s=END_S)
    assert set(outcome.codes) == {0}, outcome.output
    return folder / "run"


class Disturbed:
    """A run of two ranks on two nodes that is to be disturbed, and its folder.

    Args:
        cluster: where it runs.
        config: of the run.
        folder: of the job's output.
        options: more of sbatch.
        settings: more of `--set`.
    """

    def __init__(
        self,
        cluster: Cluster,
        config: Path,
        folder: Path,
        *options: str,
        settings: Sequence[str] = (),
    ) -> None:
        self.cluster = cluster
        self.run_dir = folder / "run"
        self.job = submit_training(
            cluster, folder, config, ["--nodes=2", *options], *STEPS, *settings
        )

    def reach(self, step: int) -> list[str]:
        """Wait for a step; the job's nodes."""
        what = f"step {step}"
        self.cluster.wait(lambda: last_step(self.run_dir) >= step, what, START_S)
        return self.nodes

    @property
    def nodes(self) -> list[str]:
        """Where the job runs now, its first node first."""
        shown = self.cluster.run("scontrol", "show", "hostnames", self.job.field("NodeList"))
        return shown.split()

    def ends_as(self, quiet: Path) -> None:
        """See that the job ends well, by itself, with the metrics of the quiet run."""
        state = self.job.finish(END_S)
        assert state == "COMPLETED", f"{self.job.log}\n{self.cluster.logs()}"
        assert metrics_without_times(self.run_dir) == metrics_without_times(quiet), self.job.log


@pytest.fixture
def run(cluster: Cluster, config: Path, tmp_path: Path) -> Disturbed:
    """A run that has just been submitted."""
    return Disturbed(cluster, config, tmp_path)


def _kill_rank(run: Disturbed, nodes: list[str]) -> None:
    run.cluster.kill(nodes[1], "pipeline.train")


def _kill_launcher(run: Disturbed, nodes: list[str]) -> None:
    run.cluster.kill(nodes[0], "srun")


def _freeze_rank(run: Disturbed, nodes: list[str]) -> None:
    run.cluster.kill(nodes[1], "pipeline.train", number=signal.SIGSTOP)


def _cut_power(run: Disturbed, nodes: list[str]) -> None:
    run.cluster.crash(nodes[1])


def _cut_network(run: Disturbed, nodes: list[str]) -> None:
    run.cluster.cut(nodes[1])


@pytest.mark.parametrize(
    "disturb", [_kill_rank, _kill_launcher, _freeze_rank, _cut_power, _cut_network]
)
def test_a_fault_is_survived(
    run: Disturbed, quiet: Path, disturb: Callable[[Disturbed, list[str]], None]
) -> None:
    """The job is queued again and goes on, without a hand."""
    disturb(run, run.reach(REACHED))
    run.job.wait_for("run number 2", START_S)
    run.ends_as(quiet)


def test_a_step_that_is_ended_for_an_earlier_one(run: Disturbed, quiet: Path) -> None:
    """TERM to the step alone, soon after a new start: as if Slurm took it for the one before."""
    run.reach(REACHED)
    run.job.signal("USR1")
    run.job.wait_for("resumed from", START_S)
    run.cluster.run("scancel", "--signal=TERM", f"{run.job.number}.0")
    run.job.wait_for("run number 3", START_S)
    assert "the step was ended by nobody known" in run.job.log
    run.ends_as(quiet)


def test_a_controller_that_is_started_again(run: Disturbed, quiet: Path) -> None:
    """Slurm's controller is killed and comes back ten seconds later; the run does not notice."""
    run.reach(REACHED)
    run.cluster.kill_controller()
    time.sleep(10)
    run.cluster.start_controller()
    run.cluster.wait(lambda: run.cluster.run("squeue", check=False), "the controller answers")
    run.ends_as(quiet)
    assert "run number 2" not in run.job.log


@pytest.mark.parametrize("seconds", [1, 2, 3, 4, 6, 9, 13, 18])
def test_a_warning_at_any_second_of_the_start(run: Disturbed, quiet: Path, seconds: int) -> None:
    """USR1 while the script checks, srun starts, ranks import, meet, or take their first steps."""
    run.cluster.wait(lambda: run.job.state == "RUNNING", "the job runs", START_S)
    time.sleep(seconds)
    run.job.signal("USR1")
    run.job.wait_for("run number 2", START_S)
    run.ends_as(quiet)


def test_preemptions_in_a_row(cluster: Cluster, shards: Path, config: Path, tmp_path: Path) -> None:
    """Each lets the run save first; twenty of them, at steps that nobody has chosen."""
    length = "train.steps=600"
    quiet = _quiet_run(shards, tmp_path / "quiet", 2, length)
    run = Disturbed(cluster, config, tmp_path, "--partition=graced", settings=[length])
    urgent = ["sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null"]
    for number in range(1, 21):
        # Slurm warns tasks, not the script that is yet to start them.
        run.reach(last_step(run.run_dir) + 3)
        cluster.run(*urgent, "--wrap=sleep 1")
        run.job.wait_for(f"run number {number + 1}", START_S)
    run.ends_as(quiet)


def test_eight_ranks_on_four_nodes(
    cluster: Cluster, shards: Path, config: Path, tmp_path: Path
) -> None:
    """Four nodes of two ranks each train as eight processes on one machine do."""
    settings = ["train.steps=60", "batch.micro_size=1", "train.heartbeat_timeout_s=60"]
    quiet = _quiet_run(shards, tmp_path / "quiet", 8, *settings)
    options = ["--nodes=4", "--ntasks-per-node=2"]
    job = submit_training(cluster, tmp_path, config, options, *STEPS, *settings)
    assert job.finish(END_S) == "COMPLETED", job.log
    assert metrics_without_times(tmp_path / "run") == metrics_without_times(quiet)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder of 256 MiB that all nodes see which are switched on from now on."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def _fill(ballast: Path) -> None:
    """Write to a file until its disk is full."""
    block = bytes(1 << 20)
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(block):
            pass


def test_a_full_disk(small_disk: Path, shards: Path, tmp_path: Path, quiet: Path) -> None:
    """Saves fail with a warning, metrics wait for room; with room again nothing is missing."""
    config = written_config(shards, tmp_path, run_dir=small_disk / "run")
    run_dir, ballast = small_disk / "run", small_disk / "ballast"
    ballast.touch()  # a full disk has no room for a new file's name either
    for cluster in running(Settings()):
        job = submit_training(cluster, tmp_path, config, ["--nodes=2"], *STEPS)
        cluster.wait(lambda: last_step(run_dir) >= REACHED, "the run trains", START_S)
        _fill(ballast)
        job.wait_for("No space left on device", START_S)
        ballast.unlink()
        assert job.finish(END_S) == "COMPLETED", job.log
        records = metrics_without_times(run_dir)
        assert sum(record.pop("save_failed", 0) for record in records) > 0
        assert records == metrics_without_times(quiet)
