"""What the pretraining job asks for, passes on and refuses."""

import os
import shlex
import sys
from pathlib import Path

import pytest

from tests.slurm.stand_ins import STARTED, Job


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
