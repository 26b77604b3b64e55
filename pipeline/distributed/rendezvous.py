"""How a process finds its place: its rank and the rendezvous, from the launcher's variables."""

import re
import subprocess
from collections.abc import Mapping
from typing import NamedTuple

from model.errors import ConfigError


class RankInfo(NamedTuple):
    """This process's rank position in the job.

    Attributes:
        rank: from 0 to world_size - 1.
        local_rank: index among the ranks of this node; chooses the GPU.
        world_size: number of ranks.
    """

    rank: int
    local_rank: int
    world_size: int


_LAUNCHERS = (
    # torchrun, deepspeed and hand-set variables; then plain srun.
    ("RANK", "LOCAL_RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
)


def rank_info(environment: Mapping[str, str]) -> RankInfo:
    """Read the rank position of this process from torchrun's or Slurm's variables.

    Without either it is a job of one process. A Slurm batch script outside `srun` has
    SLURM_NTASKS but no step; it too is one process.

    Raises:
        ConfigError: the variables are not of a job.
    """
    names = _launcher_variables(environment)
    if names is None:
        return RankInfo(0, 0, 1)
    info = RankInfo(*(_number_of(name, environment.get(name, "0")) for name in names))
    if not 0 <= info.rank < info.world_size:
        raise ConfigError(
            f"{names[0]}={info.rank} is not a rank of {names[2]}={info.world_size}, which "
            "has ranks from 0; start the job by torchrun or srun, or unset both variables"
        )
    return info


def ranks_per_node(environment: Mapping[str, str]) -> int | None:
    """How many ranks each node has; None when nobody says, or it is not the same for all."""
    if "SLURM_STEP_ID" in environment and "LOCAL_WORLD_SIZE" not in environment:
        text = environment.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(x")[0]
    else:
        text = environment.get("LOCAL_WORLD_SIZE", "")
    return int(text) if text.isdecimal() and int(text) > 0 else None


def step_nodes(environment: Mapping[str, str]) -> list[str]:
    """Names of the nodes of this Slurm step, in order; empty when they cannot be found out."""
    nodes = environment.get("SLURM_STEP_NODELIST", "")
    try:
        shown = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return []
    return shown.stdout.split()


def rank_variables(environment: Mapping[str, str]) -> tuple[str, str]:
    """Names of the variables that hold the rank and the world size."""
    rank, _, world = _launcher_variables(environment) or _LAUNCHERS[0]
    return rank, world


def _launcher_variables(environment: Mapping[str, str]) -> tuple[str, str, str] | None:
    for names in _LAUNCHERS:
        if names[0].startswith("SLURM") and "SLURM_STEP_ID" not in environment:
            continue
        if names[0] in environment and names[2] in environment:
            return names
    return None


def _number_of(name: str, text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text):
        raise ConfigError(
            f"{name}={text[:40]!r} in the environment is not a number of a rank or of ranks; start "
            "the job by torchrun or srun, or unset the variable"
        )
    return int(text)


def device_index(info: RankInfo, visible: int, environment: Mapping[str, str]) -> int:
    """Which of the visible GPUs is this rank's.

    Each rank takes the one of its local rank, unless Slurm shows every task a GPU of its own.

    Raises:
        ConfigError: there are more ranks on this node than GPUs.
    """
    if visible == 1 and "SLURM_STEP_ID" in environment and "SLURM_STEP_GPUS" in environment:
        return 0
    if info.local_rank >= visible:
        raise ConfigError(
            f"rank {info.rank}/{info.world_size} is number {info.local_rank} on its node, but only "
            f"{visible} GPUs are visible there; each rank needs its own: start at most {visible} "
            "ranks on each node, or check CUDA_VISIBLE_DEVICES"
        )
    return info.local_rank


def rendezvous(environment: Mapping[str, str]) -> tuple[str, str]:
    """Address and port where the ranks meet: MASTER_ADDR and MASTER_PORT, or from Slurm's.

    Under plain `srun` the first node of the step is the address, and the job's number makes the
    port, so that two jobs that share a node do not meet.

    Raises:
        ConfigError: a step over several nodes whose names cannot be found out, or no port.
    """
    job = environment.get("SLURM_JOB_ID", "") if "SLURM_STEP_ID" in environment else ""
    default_port = str(20000 + int(job) % 10000) if job.isdigit() else "29500"
    port = environment.get("MASTER_PORT", default_port)
    if not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 1 << 16:
        raise ConfigError(
            f"MASTER_PORT={port[:40]!r} in the environment is not a port; set it to a number from "
            "1 to 65535, or unset it"
        )
    if "MASTER_ADDR" in environment:
        return environment["MASTER_ADDR"], port
    if not job or environment.get("SLURM_STEP_NUM_NODES", "1") == "1":
        return "127.0.0.1", port
    names = step_nodes(environment)
    if not names:
        nodes = environment.get("SLURM_STEP_NODELIST", "")
        raise ConfigError(
            f"MASTER_ADDR is not set and SLURM_STEP_NODELIST={nodes!r} cannot be expanded; export "
            "MASTER_ADDR=<name of the first node> before srun, as slurm/pretrain_7b.sh does"
        )
    return names[0], port
