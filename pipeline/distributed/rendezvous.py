"""How a process joins its job: its rank from the launcher's variables, and the rendezvous."""

import os
import re
import subprocess
from collections.abc import Mapping
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

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
    for names in _LAUNCHERS:
        if names[0].startswith("SLURM") and "SLURM_STEP_ID" not in environment:
            continue
        if names[0] in environment and names[2] in environment:
            info = RankInfo(*(_number_of(name, environment.get(name, "0")) for name in names))
            if not 0 <= info.rank < info.world_size:
                raise ConfigError(
                    f"{names[0]}={info.rank} is not a rank of {names[2]}={info.world_size}, which "
                    "has ranks from 0; start the job by torchrun or srun, or unset both variables"
                )
            return info
    return RankInfo(0, 0, 1)


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
        ConfigError: a step over several nodes whose names cannot be found out.
    """
    job = environment.get("SLURM_JOB_ID", "") if "SLURM_STEP_ID" in environment else ""
    default_port = str(20000 + int(job) % 10000) if job.isdigit() else "29500"
    port = environment.get("MASTER_PORT", default_port)
    if "MASTER_ADDR" in environment:
        return environment["MASTER_ADDR"], port
    if not job or environment.get("SLURM_STEP_NUM_NODES", "1") == "1":
        return "127.0.0.1", port
    nodes = environment.get("SLURM_STEP_NODELIST", "")
    try:
        shown = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        )
        return shown.stdout.split()[0], port
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise ConfigError(
            f"MASTER_ADDR is not set and SLURM_STEP_NODELIST={nodes!r} cannot be expanded; export "
            "MASTER_ADDR=<name of the first node> before srun, as slurm/pretrain_7b.sh does"
        ) from None


def start_process_group(info: RankInfo, device: torch.device, timeout_s: float) -> None:
    """Join the job's process group: NCCL on GPUs, gloo on CPUs.

    Raises:
        ConfigError: the rendezvous failed (port taken, main node not reached).
    """
    address, port = rendezvous(os.environ)
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=port)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend,
            init_method="env://" if info.world_size > 1 else None,
            store=None if info.world_size > 1 else dist.HashStore(),  # type: ignore[attr-defined]
            rank=info.rank,
            world_size=info.world_size,
            timeout=timedelta(seconds=timeout_s),
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"MASTER_ADDR={address} MASTER_PORT={port}: rank {info.rank}/{info.world_size} could "
            f"not join the job ({reason}); the port must be free on the first node and reachable "
            "from all others: choose another MASTER_PORT, or check the address"
        ) from error


def is_communication_error(error: Exception) -> bool:
    """Whether a collective broke, as it does when another rank is gone."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("gloo", "nccl", "connection", "timed out", "socket")
    )
