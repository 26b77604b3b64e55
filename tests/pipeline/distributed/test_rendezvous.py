"""How a process finds its place: torchrun, Slurm, or alone."""

import pytest

from model.errors import ConfigError
from pipeline.distributed.rendezvous import RankInfo, device_index, rank_info, rendezvous
from tests.support.hostile import check_message

STEP = {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "123456"}


def test_rank_from_torchrun_then_slurm_then_alone() -> None:
    """Torchrun's variables win; a batch script outside srun is one process."""
    slurm = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}
    torchrun = {"RANK": "3", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}
    assert rank_info({}) == RankInfo(0, 0, 1)
    assert rank_info(slurm) == RankInfo(0, 0, 1)
    assert rank_info({**slurm, **STEP}) == RankInfo(5, 1, 8)
    assert rank_info({**slurm, **STEP, **torchrun}) == RankInfo(3, 0, 4)


def test_each_rank_has_a_gpu_of_its_own() -> None:
    """The local rank's GPU; the only visible one when Slurm hands them out; else an error."""
    assert device_index(RankInfo(5, 1, 8), 4, {}) == 1
    assert device_index(RankInfo(5, 1, 8), 1, {**STEP, "SLURM_STEP_GPUS": "1"}) == 0
    with pytest.raises(ConfigError, match="at most 1 ranks"):
        device_index(RankInfo(1, 1, 2), 1, {})


def test_rendezvous() -> None:
    """Given variables win; under Slurm the job's number makes the port."""
    assert rendezvous({}) == ("127.0.0.1", "29500")
    assert rendezvous({"MASTER_ADDR": "a", "MASTER_PORT": "1"}) == ("a", "1")
    assert rendezvous(STEP) == ("127.0.0.1", "23456")
    several = {**STEP, "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "node[1-2"}
    with pytest.raises(ConfigError, match="export MASTER_ADDR"):
        rendezvous(several)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x' in the environment is not a number"),
        ({"RANK": "0", "WORLD_SIZE": "-2"}, "WORLD_SIZE='-2' in the environment"),
        ({"RANK": "0", "WORLD_SIZE": "9" * 5000}, "WORLD_SIZE='999"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 is not a rank of WORLD_SIZE=0"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is not a rank of WORLD_SIZE=2"),
        ({"SLURM_PROCID": "", "SLURM_NTASKS": "2", **STEP}, "SLURM_PROCID='' in the environment"),
    ],
)
def test_variables_of_no_job_are_refused(variables: dict[str, str], words: str) -> None:
    """The variable is named, in one line."""
    with pytest.raises(ConfigError) as caught:
        rank_info(variables)
    assert str(caught.value).startswith(words)
    check_message(str(caught.value))


@pytest.mark.parametrize("port", ["", "http", "0", "65536", "-1", "1e3", "29500 "])
def test_a_port_that_is_none(port: str) -> None:
    """It is refused at once, not waited for."""
    with pytest.raises(ConfigError, match="is not a port; set it to a number from 1 to 65535"):
        rendezvous({"MASTER_ADDR": "a", "MASTER_PORT": port})
