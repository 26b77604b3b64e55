"""The job scripts, run by bash with stand-ins for Slurm's commands: what they ask for, pass on."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
JOB_SCRIPTS = ("pretrain_7b.sh", "shard_corpus.sh", "export.sh")
STARTED = "started"

# Writes down how it was called, runs as the test says; USR1 ends it with the trainer's status 75.
FAKE_SRUN = """#!/bin/bash
case "$*" in *--notify*) exit ;; esac
printf '%s\\n' "$@" > "$RECORD/srun_arguments"
env > "$RECORD/srun_environment"
trap 'echo USR1 >> "$RECORD/signals"; sleep 0.3; exit "${STATUS_ON_USR1:-75}"' USR1
touch "$RECORD/started"
for _ in $(seq "${STEP_TICKS:-0}"); do sleep 0.05; done
exit "${STEP_STATUS:-0}"
"""
# Says who it is; else srun under another name. TERM ends it with a status of its own.
FAKE_MPIRUN = """#!/bin/bash
[ "$1" != --version ] || { echo "${FAKE_MPI:-HYDRA build details: 5.0.2}"; exit 0; }
printf '%s\\n' "$@" > "$RECORD/mpirun_arguments"
trap 'echo TERM >> "$RECORD/signals"; exit 9' TERM
touch "$RECORD/started"
for _ in $(seq "${STEP_TICKS:-0}"); do sleep 0.05; done
exit "${STEP_STATUS:-0}"
"""
FAKE_SCONTROL = """#!/bin/bash
case "$1 $2" in
  "show hostnames") printf '%s\\n' alpha7 alpha8 beta1 ;;
  "show job") printf '   %s\\n' "StdOut=$RECORD/output" Restarts=0 \\
    "JobState=${FAKE_STATE:-RUNNING}" \\
    "TimeLimit=${FAKE_LIMIT:-01:00:00}" "Command=${FAKE_COMMAND:-(null)}" ;;
  requeue*) echo "$2" > "$RECORD/requeued"; kill -KILL "$PPID" ;; # Slurm ends the script
esac
"""
# Counts GPUs, and checks a run before it starts; the step itself is srun's.
FAKE_PYTHON = """#!/bin/bash
[ "$1" != -c ] || echo "${FAKE_GPUS:-0}"
case "$*" in
  *--check*)
    printf '%s\\n' "$@" > "$RECORD/check_arguments"
    [ -n "${CHECK_STATUS:-}" ] || { echo "$RECORD/run"; exit 0; }
    echo "error: train.steps must be a number" >&2
    exit "$CHECK_STATUS" ;;
  *--notify*) printf '%s\\n' "${@: -2}" >> "$RECORD/told" ;;
esac
"""


class Job:
    """One job script with its stand-ins, in a folder of its own.

    Args:
        folder: an empty folder.
        script: name of the job script.
    """

    def __init__(self, folder: Path, script: str) -> None:
        self.record = folder / "record"
        self.record.mkdir()
        commands = folder / "bin"
        commands.mkdir()
        fakes = {
            "srun": FAKE_SRUN,
            "mpirun": FAKE_MPIRUN,
            "scontrol": FAKE_SCONTROL,
            "fake-python": FAKE_PYTHON,
        }
        for name, text in fakes.items():
            (commands / name).write_text(text)
            (commands / name).chmod(0o755)
        # sbatch runs a copy of the script, from another folder.
        self.script = folder / "slurm_script"
        self.script.write_bytes((ROOT / "slurm" / script).read_bytes())
        self.environment = {
            "PATH": f"{commands}:{os.environ['PATH']}",
            "RECORD": str(self.record),
            "PYTHON": "fake-python",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "1234567",
            "SLURM_JOB_NAME": "job",
            "SLURM_JOB_NUM_NODES": "3",
            "SLURM_JOB_NODELIST": "alpha[7-8],beta1",
            "SLURM_CPUS_ON_NODE": "96",
        }

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start the script with more environment."""
        return subprocess.Popen(
            ["bash", str(self.script), *arguments],
            env=self.environment | environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, **environment: str) -> tuple[int, str]:
        """Run the script to its end; exit status and output."""
        process = self.start(*arguments, **environment)
        output, _ = process.communicate(timeout=240)
        return process.returncode, output

    def signal_step(self, number: signal.Signals, **environment: str) -> tuple[int, str]:
        """Start the script, signal it while the step runs; exit status and output."""
        process = self.start(STEP_TICKS="400", **environment)
        deadline_s = time.monotonic() + 30
        while not (self.record / STARTED).exists():
            assert time.monotonic() < deadline_s, "the step did not start"
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        process.send_signal(number)
        output, _ = process.communicate(timeout=240)
        return process.returncode, output

    def srun_arguments(self) -> list[str]:
        """What srun was called with."""
        return (self.record / "srun_arguments").read_text().splitlines()

    def told(self) -> list[str]:
        """Outcome and reason of each call of run.notify."""
        path = self.record / "told"
        return path.read_text().splitlines() if path.exists() else []

    def mpirun_arguments(self) -> list[str]:
        """What mpirun was called with."""
        return (self.record / "mpirun_arguments").read_text().splitlines()

    def srun_environment(self) -> dict[str, str]:
        """The variables that reach the tasks."""
        lines = (self.record / "srun_environment").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)


@pytest.fixture
def pretrain(tmp_path: Path) -> Job:
    """The pretraining job."""
    return Job(tmp_path, "pretrain_7b.sh")


@pytest.fixture
def shard(tmp_path: Path) -> Job:
    """The shard job, with what it requires."""
    job = Job(tmp_path, "shard_corpus.sh")
    job.environment |= {
        "INPUT": "raw/a raw/b",
        "OUTPUT": "data/c",
        "TOKENIZER": "train:32000",
        "SLURM_JOB_NUM_NODES": "1",
    }
    return job


def _directives(script: str) -> list[str]:
    text = (ROOT / "slurm" / script).read_text()
    return re.findall(r"^#SBATCH +(.*)$", text, re.MULTILINE)


@pytest.mark.parametrize("path", sorted((ROOT / "slurm").glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_valid_bash(path: Path) -> None:
    """A typo is found before a job waits in a queue for it."""
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("script", JOB_SCRIPTS)
def test_nothing_of_one_cluster_is_in_the_directives(script: str) -> None:
    """Partition, account and the like come from the command line, as does the time limit."""
    names = {directive.split("=")[0].split()[0] for directive in _directives(script)}
    site = {"partition", "account", "qos", "constraint", "reservation", "time", "gres"}
    assert names & {f"--{name}" for name in site} == set()
    assert names & {"-p", "-A", "-q", "-C", "-t"} == set()
    assert {"--nodes", "--requeue"} <= names
    assert "--open-mode=append" in _directives(script)
    if script != "export.sh":  # which has nothing to save
        assert any(directive.startswith("--signal=B:USR1@") for directive in _directives(script))


def test_pretrain_starts_a_process_per_gpu_on_every_node(pretrain: Job) -> None:
    """3 nodes of 8 GPUs are 24 processes; each has its share of CPUs and sees its node's GPUs."""
    status, output = pretrain.run(FAKE_GPUS="8", SLURM_GPUS_ON_NODE="8")
    assert status == 0, output
    arguments = pretrain.srun_arguments()
    for expected in (
        "--nodes=3",
        "--ntasks=24",
        "--ntasks-per-node=8",
        "--cpus-per-task=12",
        "--gpus-per-node=8",
        "--kill-on-bad-exit=1",
    ):
        assert expected in arguments
    command = arguments[arguments.index("fake-python") :]
    assert shlex.join(command) == "fake-python -m pipeline.train configs/7b.yaml --resume auto"
    check = (pretrain.record / "check_arguments").read_text().split()
    assert check[-3:] == ["--check", "--world-size", "24"]


def test_pretrain_without_a_driver_starts_one_process_per_node(pretrain: Job) -> None:
    """GPUs that Slurm counts and torch cannot see do not multiply processes; it is said."""
    status, output = pretrain.run(FAKE_GPUS="0", SLURM_GPUS_ON_NODE="8")
    assert status == 0, output
    assert "--ntasks=3" in pretrain.srun_arguments()
    assert "torch sees none" in output


def test_pretrain_takes_no_more_gpus_than_were_asked_for(pretrain: Job) -> None:
    """--gpus-per-node=h100:4 on nodes of 8 is 4 processes for each."""
    status, output = pretrain.run(
        FAKE_GPUS="8", SLURM_GPUS_ON_NODE="8", SLURM_GPUS_PER_NODE="h100:4"
    )
    assert status == 0, output
    assert "--ntasks=12" in pretrain.srun_arguments()
    assert "--gpus-per-node=4" in pretrain.srun_arguments()


def test_pretrain_finds_its_rendezvous_from_the_node_list(pretrain: Job) -> None:
    """The first node of the list and a port from the job's id; a shell's old values do not win."""
    status, output = pretrain.run(MASTER_ADDR="stale", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    assert status == 0, output
    environment = pretrain.srun_environment()
    assert environment["MASTER_ADDR"] == "alpha7"
    assert environment["MASTER_PORT"] == str(20000 + 1234567 % 10000)
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & environment.keys()


def test_pretrain_threads_are_bounded_by_the_cores_that_exist(pretrain: Job) -> None:
    """A node that claims 96 CPUs on a small machine does not start 96 threads."""
    status, output = pretrain.run(RANKS_PER_NODE="1")
    assert status == 0, output
    cores = len(os.sched_getaffinity(0))
    assert int(pretrain.srun_environment()["OMP_NUM_THREADS"]) == cores


def test_pretrain_passes_configuration_and_arguments_on(pretrain: Job) -> None:
    """CONFIG, ARGS and the script's own arguments reach the trainer, words with blanks whole."""
    status, output = pretrain.run(
        "--set",
        "run.name=two words",
        CONFIG="configs/quickstart.yaml",
        ARGS="--set train.steps=7",
        RANKS_PER_NODE="2",
    )
    assert status == 0, output
    arguments = pretrain.srun_arguments()
    assert "--ntasks=6" in arguments
    assert arguments[arguments.index("pipeline.train") + 1 :] == [
        *["configs/quickstart.yaml", "--resume", "auto"],
        *["--set", "train.steps=7", "--set", "run.name=two words"],
    ]


@pytest.mark.parametrize("step_status", [1, 2, 75, 143])
def test_exit_status_of_the_step_is_the_jobs(pretrain: Job, step_status: int) -> None:
    """A failed step is a failed job, with the same status, and is not queued again by itself."""
    status, output = pretrain.run(STEP_STATUS=str(step_status))
    assert status == step_status, output
    assert not (pretrain.record / "requeued").exists()


@pytest.mark.parametrize("step_status", [75, 143])
@pytest.mark.parametrize(
    ("environment", "queued"),
    [
        ({"SLURM_RESTART_COUNT": "1"}, True),
        ({"SLURM_RESTART_COUNT": "1", "FAKE_STATE": "CANCELLED"}, False),
        ({"SLURM_RESTART_COUNT": "0"}, False),
    ],
)
def test_a_late_end_of_the_start_before_does_not_end_this_one(
    pretrain: Job, environment: dict[str, str], queued: bool, step_status: int
) -> None:
    """Steps of all starts have the same number: one that ends early is queued again."""
    status, output = pretrain.run(STEP_STATUS=str(step_status), **environment)
    assert (pretrain.record / "requeued").exists() == queued, output
    assert status == (-signal.SIGKILL if queued else step_status)


def test_time_limit_warning_reaches_the_tasks_and_queues_again(pretrain: Job) -> None:
    """USR1 is handed on, the step's end is waited for, and the same job id goes on later."""
    status, output = pretrain.signal_step(signal.SIGUSR1)
    assert (pretrain.record / "signals").read_text() == "USR1\n"
    assert "srun ended with status 75" in output
    assert (pretrain.record / "requeued").read_text() == "1234567\n"
    assert status == -signal.SIGKILL


@pytest.mark.parametrize("step_status", [0, 1])
def test_a_run_that_ended_at_the_warning_is_not_queued_again(
    pretrain: Job, step_status: int
) -> None:
    """Done is done, and a failure to save would only repeat itself."""
    status, output = pretrain.signal_step(signal.SIGUSR1, STATUS_ON_USR1=str(step_status))
    assert status == step_status, output
    assert not (pretrain.record / "requeued").exists()


def test_cancelling_waits_for_the_save_and_does_not_queue_again(pretrain: Job) -> None:
    """TERM reaches the tasks, which save; the job ends with their status."""
    status, output = pretrain.signal_step(signal.SIGTERM)
    assert status == 75, output
    assert "stopped on request" in output
    assert not (pretrain.record / "requeued").exists()


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"HEADWAY_ROOT": "/"}, "/ is not the checkout"),
        ({"CONFIG": "configs/missing.yaml"}, "CONFIG=configs/missing.yaml"),
        ({"PYTHON": "no-such-python"}, "set PYTHON"),
    ],
)
def test_pretrain_says_what_is_missing(
    pretrain: Job, environment: dict[str, str], named: str
) -> None:
    """One line that names what to do, before any node starts."""
    status, output = pretrain.run(**environment)
    assert status == 2
    assert named in output
    assert not (pretrain.record / STARTED).exists()


def test_shard_job_runs_the_shard_command(shard: Job) -> None:
    """One task on one node with all of its CPUs, inputs split, further arguments passed on."""
    status, output = shard.run("--exclude", "*.min.js")
    assert status == 0, output
    arguments = shard.srun_arguments()
    assert arguments[:3] == ["--nodes=1", "--ntasks=1", "--cpus-per-task=96"]
    assert arguments[arguments.index("fake-python") + 1 :] == [
        *[f"{ROOT}/data_prep/shard.py", "--input", "raw/a", "raw/b", "--output", "data/c"],
        *["--tokenizer", "train:32000", "--exclude", "*.min.js"],
    ]


@pytest.mark.parametrize("name", ["INPUT", "OUTPUT", "TOKENIZER"])
def test_shard_job_says_which_variable_is_missing(shard: Job, name: str) -> None:
    """A job without its input ends at once and says so."""
    status, output = shard.run(**{name: ""})
    assert status == 2
    assert f"{name} is not set" in output
    assert not (shard.record / STARTED).exists()


def test_shard_job_killed_by_the_warning_is_queued_again(shard: Job) -> None:
    """The shard command has nothing to save: ended by USR1, it finishes the rest next time."""
    shard.signal_step(signal.SIGUSR1, STATUS_ON_USR1="138")
    assert (shard.record / "requeued").read_text() == "1234567\n"


def test_shard_job_takes_a_configuration(shard: Job) -> None:
    """CONFIG replaces the three variables; those that are set still win over it."""
    config = "configs/data/mixture.yaml"
    status, output = shard.run("--dedup", CONFIG=config, INPUT="", TOKENIZER="")
    assert status == 0, output
    arguments = shard.srun_arguments()
    assert arguments[arguments.index(f"{ROOT}/data_prep/shard.py") + 1 :] == [
        *["--config", config, "--output", "data/c", "--dedup"],
    ]
    status, output = shard.run(CONFIG="configs/data/missing.yaml")
    assert status == 2
    assert "CONFIG=configs/data/missing.yaml does not exist" in output


@pytest.mark.parametrize(
    ("mpi", "placement"),
    [
        ("HYDRA build details: 5.0.2", ["-n", "12", "-ppn", "4"]),
        (
            "mpirun (Open MPI) 5.0.11",
            ["--map-by", "ppr:4:node:OVERSUBSCRIBE", "--bind-to", "none"],
        ),
    ],
)
def test_shard_job_on_several_nodes_starts_mpi_ranks(
    shard: Job, mpi: str, placement: list[str]
) -> None:
    """Three nodes of four ranks, by the options of the MPI that is there."""
    status, output = shard.run(SLURM_JOB_NUM_NODES="3", RANKS_PER_NODE="4", FAKE_MPI=mpi)
    assert status == 0, output
    arguments = shard.mpirun_arguments()
    assert arguments[: len(placement)] == placement
    assert arguments[len(placement) : len(placement) + 2] == [
        *["fake-python", f"{ROOT}/data_prep/shard.py"]
    ]
    assert not (shard.record / "srun_arguments").exists()


def test_shard_job_in_an_array_is_one_task_per_element(shard: Job) -> None:
    """An element runs one process with all CPUs of its node, which finds its task by itself."""
    status, output = shard.run(SLURM_ARRAY_TASK_ID="3", SLURM_ARRAY_TASK_COUNT="8")
    assert status == 0, output
    assert shard.srun_arguments()[:3] == ["--nodes=1", "--ntasks=1", "--cpus-per-task=96"]
    assert shard.srun_environment()["SLURM_ARRAY_TASK_ID"] == "3"


def test_shard_job_without_mpirun_names_the_ways_out(shard: Job) -> None:
    """Several nodes and no launcher: one line, with the array that would do the same."""
    status, output = shard.run(SLURM_JOB_NUM_NODES="3", MPIRUN="/no/such/mpirun")
    assert status == 2
    assert "--nodes=1 --array=0-2" in output
    assert not (shard.record / STARTED).exists()


def test_shard_job_under_mpi_is_queued_again_at_the_warning(shard: Job) -> None:
    """The launcher gets TERM; whatever status it makes of that, the job goes on later."""
    shard.signal_step(signal.SIGUSR1, SLURM_JOB_NUM_NODES="2")
    assert (shard.record / "signals").read_text() == "TERM\n"
    assert (shard.record / "requeued").read_text() == "1234567\n"


@pytest.mark.parametrize("step_status", [1, 3])
def test_shard_job_under_mpi_keeps_the_commands_own_status(shard: Job, step_status: int) -> None:
    """An error of the data ends the job with its status and is not queued again."""
    status, output = shard.run(SLURM_JOB_NUM_NODES="2", STEP_STATUS=str(step_status))
    assert status == step_status, output
    assert not (shard.record / "requeued").exists()


def test_pretrain_asks_the_real_torch_for_gpus(pretrain: Job) -> None:
    """With the interpreter of these tests the number of processes is what torch sees."""
    import torch

    asked = Path(pretrain.environment["PATH"].split(":")[0]) / "asked-python"
    asked.write_text(
        f'#!/bin/bash\n[ "$1" = -c ] && exec {sys.executable} "$@"\nfake-python "$@"\n'
    )
    asked.chmod(0o755)
    status, output = pretrain.run(PYTHON="asked-python")
    assert status == 0, output
    expected = max(torch.cuda.device_count(), 1)
    assert f"--ntasks-per-node={expected}" in pretrain.srun_arguments()


def test_a_killed_srun_is_started_again(pretrain: Job) -> None:
    """Nobody asked for that, and nothing of the run is at fault."""
    _, output = pretrain.run(STEP_STATUS="137")
    assert (pretrain.record / "requeued").read_text() == "1234567\n"
    assert "srun was killed" in output


def test_the_configuration_is_an_argument(pretrain: Job, tmp_path: Path) -> None:
    """The first argument wins over CONFIG, whose value --export=NONE would lose."""
    status, output = pretrain.run(
        "configs/quickstart.yaml", "--set", "train.steps=7", CONFIG="configs/1b.yaml"
    )
    assert status == 0, output
    arguments = pretrain.srun_arguments()
    assert arguments[arguments.index("pipeline.train") + 1 :] == [
        *["configs/quickstart.yaml", "--resume", "auto", "--set", "train.steps=7"]
    ]
    assert pretrain.srun_environment()["SLURM_EXPORT_ENV"] == "ALL"


def test_a_job_that_is_queued_again_goes_on(pretrain: Job) -> None:
    """It was to begin anew once, and not at each requeue."""
    status, output = pretrain.run("--resume", "none", RANKS_PER_NODE="1")
    assert status == 0, output
    assert pretrain.srun_arguments()[-2:] == ["--resume", "none"]
    status, output = pretrain.run("--resume", "none", RANKS_PER_NODE="1", SLURM_RESTART_COUNT="1")
    assert status == 0, output
    assert pretrain.srun_arguments()[-2:] == ["--resume", "auto"]


def test_a_run_that_cannot_train_is_refused_before_srun(pretrain: Job) -> None:
    """The check's own line is the last one, its status the job's."""
    status, output = pretrain.run(CHECK_STATUS="2")
    assert status == 2
    assert output.splitlines()[-1] == "error: train.steps must be a number"
    assert not (pretrain.record / STARTED).exists()


@pytest.mark.parametrize(
    ("environment", "ranks", "cpus", "gpus"),
    [
        ({"SLURM_GPUS": "h100:12", "SLURM_GPUS_ON_NODE": "8"}, 4, 24, 4),
        ({"SLURM_GPUS_ON_NODE": "4"}, 4, 24, 4),  # --gres=gpu:4
        ({"SLURM_NTASKS_PER_NODE": "2", "SLURM_GPUS_ON_NODE": "8"}, 2, 48, 8),
        ({"SLURM_JOB_CPUS_PER_NODE": "96(x2),32", "SLURM_GPUS_ON_NODE": "8"}, 8, 4, 8),
    ],
)
def test_pretrain_asks_for_what_every_node_has(
    pretrain: Job, environment: dict[str, str], ranks: int, cpus: int, gpus: int
) -> None:
    """GPUs of the job are divided by its nodes; the smallest node's CPUs by its processes."""
    status, output = pretrain.run(FAKE_GPUS="8", **environment)
    assert status == 0, output
    arguments = pretrain.srun_arguments()
    for expected in (
        f"--ntasks-per-node={ranks}",
        f"--cpus-per-task={cpus}",
        f"--gpus-per-node={gpus}",
    ):
        assert expected in arguments
    assert not {"SLURM_GPUS", "SLURM_NTASKS_PER_NODE"} & pretrain.srun_environment().keys()


def test_gpus_that_nodes_cannot_share_evenly_are_refused(pretrain: Job) -> None:
    """--gpus counts those of the whole job."""
    status, output = pretrain.run(SLURM_GPUS="h100:8")
    assert status == 2
    assert "--gpus=h100:8 are not the same number on each of 3 nodes" in output


def test_options_of_srun_and_a_container_are_one_variable_each(pretrain: Job) -> None:
    """They reach the step, and the checks before it run in the same container."""
    status, output = pretrain.run(
        SRUN_ARGS="--cpu-bind=none --network=x", CONTAINER_IMAGE="img", RANKS_PER_NODE="1"
    )
    # With srun as its launcher the check gives no folder here: it only writes down its arguments.
    assert status == 0, output
    arguments = pretrain.srun_arguments()
    assert arguments[:3] == ["--cpu-bind=none", "--network=x", "--container-image=img"]
    command = ["fake-python", "-m", "pipeline.train", "configs/7b.yaml", "--resume", "auto"]
    assert arguments[-6:] == command


def test_apptainer_stands_before_the_interpreter(pretrain: Job) -> None:
    """Its options and image are one variable; the check goes through it, too."""
    apptainer = Path(pretrain.environment["PATH"].split(":")[0]) / "apptainer"
    apptainer.write_text('#!/bin/bash\nshift 3\nexec "$@"\n')
    apptainer.chmod(0o755)
    status, output = pretrain.run(APPTAINER="--nv image.sif", RANKS_PER_NODE="1")
    assert status == 0, output
    arguments = pretrain.srun_arguments()
    begin = arguments.index("apptainer")
    assert arguments[begin : begin + 5] == ["apptainer", "exec", "--nv", "image.sif", "fake-python"]
    assert (pretrain.record / "check_arguments").exists()


def test_an_array_task_queues_itself_and_not_its_array(shard: Job) -> None:
    """Tasks that have finished are not run again."""
    shard.signal_step(
        signal.SIGUSR1,
        **{"SLURM_ARRAY_JOB_ID": "1234560", "SLURM_ARRAY_TASK_ID": "7", "STATUS_ON_USR1": "138"},
    )
    assert (shard.record / "requeued").read_text() == "1234560_7\n"


def test_a_job_without_progress_is_stopped_with_the_reason(pretrain: Job) -> None:
    """Requeues that the job asked for are counted until there is a new checkpoint."""
    run_dir = pretrain.record / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    for number in range(3):
        pretrain.signal_step(signal.SIGUSR1)
        assert (pretrain.record / "requeued").exists(), number
        (pretrain.record / "requeued").unlink()
        (pretrain.record / STARTED).unlink()
        if number == 0:
            (run_dir / "checkpoints" / "latest").write_text("step_00000100\n")
    pretrain.signal_step(signal.SIGUSR1)
    (pretrain.record / "requeued").unlink()
    (pretrain.record / STARTED).unlink()
    status, output = pretrain.signal_step(signal.SIGUSR1)
    assert status == 1
    assert "queued again 3 times without progress (it is at: step_00000100)" in output
    assert not (pretrain.record / "requeued").exists()


def test_cancelling_a_job_that_was_warned_ends_it(pretrain: Job) -> None:
    """A `scancel` in the minutes before the time limit is no requeue."""
    process = pretrain.start(STEP_TICKS="400", STATUS_ON_USR1="75")
    deadline_s = time.monotonic() + 60
    while not (pretrain.record / STARTED).exists():
        assert time.monotonic() < deadline_s, "the step did not start"
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 75, output
    assert not (pretrain.record / "requeued").exists()


def test_a_warning_that_is_due_before_the_start_is_refused(pretrain: Job) -> None:
    """--signal of 300 s and a time limit of 5 minutes: the job would be warned at each start."""
    status, output = pretrain.signal_step(signal.SIGUSR1, FAKE_LIMIT="00:05:00")
    assert status == 2
    assert "the time limit of 300 s is not above the 300 s of --signal" in output
    assert not (pretrain.record / "requeued").exists()


def test_the_error_of_any_rank_is_the_last_line(pretrain: Job) -> None:
    """It stands in the run's verdict; that of an earlier start is not taken for it."""
    run_dir = pretrain.record / "run"
    run_dir.mkdir()
    content = {"start": "1234567.0", "outcome": "failed", "message": 'rank 3: there is no "x"'}
    text = json.dumps(content, indent=1)
    (run_dir / "verdict.json").write_text(text)
    status, output = pretrain.run(STEP_STATUS="1")
    assert status == 1
    assert output.splitlines()[-1] == 'error: rank 3: there is no "x"'
    (run_dir / "verdict.json").write_text(text.replace("1234567.0", "1234567.1"))
    status, output = pretrain.run(STEP_STATUS="1")
    assert output.splitlines()[-1].startswith("error: the step ended with status 1")


def test_export_runs_the_export_command(tmp_path: Path) -> None:
    """One task, with the script's arguments; without them it says how it is called."""
    export = Job(tmp_path, "export.sh")
    export.environment |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_PER_TASK": "8"}
    status, output = export.run("runs/7b", "out", "--dtype", "bf16")
    assert status == 0, output
    arguments = export.srun_arguments()
    assert arguments[:3] == ["--nodes=1", "--ntasks=1", "--cpus-per-task=8"]
    assert arguments[3:] == [
        *["fake-python", "-m", "pipeline.export", "runs/7b", "out", "--dtype", "bf16"]
    ]
    status, output = export.run("runs/7b")
    assert (status, "give a run or checkpoint and a folder" in output) == (2, True)


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({}, ["done", ""]),
        ({"CHECK_STATUS": "2"}, ["refused", "train.steps must be a number"]),
        (
            {"STEP_STATUS": "9"},
            ["failed", "the step ended with status 9; its own lines above say why"],
        ),
        ({"STEP_STATUS": "75"}, ["stopped", "stopped on request"]),
    ],
)
def test_the_job_tells_how_it_ended(
    tmp_path: Path, environment: dict[str, str], told: list[str]
) -> None:
    """`run.notify` is the script's to call, once; the ranks are told that it does."""
    job = Job(tmp_path, "pretrain_7b.sh")
    _, output = job.run(**environment)
    assert job.told() == told, output
    if "CHECK_STATUS" in environment:
        assert output.splitlines()[-1] == "error: train.steps must be a number"
    else:
        assert "HEADWAY_NOTIFIED_BY=job" in (job.record / "srun_environment").read_text()


def test_a_job_that_is_queued_again_tells_nothing(tmp_path: Path) -> None:
    """It has not ended."""
    job = Job(tmp_path, "pretrain_7b.sh")
    job.signal_step(signal.SIGUSR1)
    assert (job.record / "requeued").exists()
    assert job.told() == []
