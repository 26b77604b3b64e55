"""What the job that makes shards asks for and passes on."""

import signal

import pytest

from tests.slurm.stand_ins import ROOT, STARTED, Job


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


def test_an_array_task_queues_itself_and_not_its_array(shard: Job) -> None:
    """Tasks that have finished are not run again."""
    shard.signal_step(
        signal.SIGUSR1,
        **{"SLURM_ARRAY_JOB_ID": "1234560", "SLURM_ARRAY_TASK_ID": "7", "STATUS_ON_USR1": "138"},
    )
    assert (shard.record / "requeued").read_text() == "1234560_7\n"
