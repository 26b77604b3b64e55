"""Which rank does what: ranks from the environment, process groups, DeepSpeed's view of them."""

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from model.errors import ConfigError


class RankInfo(NamedTuple):
    """This process's place in the job.

    Attributes:
        rank: from 0 to world_size - 1.
        local_rank: place among the ranks of this node; chooses the GPU.
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
    """Read the place of this process from torchrun's or Slurm's variables.

    Without either it is a job of one process. A Slurm batch script outside `srun` has
    SLURM_NTASKS but no step; it too is one process.
    """
    for names in _LAUNCHERS:
        if names[0].startswith("SLURM") and "SLURM_STEP_ID" not in environment:
            continue
        if names[0] in environment and names[2] in environment:
            rank, local, world = (int(environment.get(name, "0")) for name in names)
            return RankInfo(rank, local, world)
    return RankInfo(0, 0, 1)


class Topology:
    """The grid of ranks: tensor-parallel ranks are neighbours, data-parallel ones apart.

    Also the `mpu` object that DeepSpeed asks for groups (megatron's own lacks names it wants).

    Attributes:
        info: this rank's place.
        tensor_size: tensor-parallel size.
        data_size: data-parallel size.
        device: where this rank computes.
    """

    def __init__(self, info: RankInfo, tensor_size: int, device: torch.device) -> None:
        self.info = info
        self.device = device
        self.tensor_size = tensor_size
        self.data_size = info.world_size // tensor_size
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_size)
        ranks: list[int] = dist.get_process_group_ranks(parallel_state.get_data_parallel_group())
        self._data_parallel_ranks = ranks

    @property
    def tensor_rank(self) -> int:
        """Place among the tensor-parallel ranks that share this model copy."""
        return int(parallel_state.get_tensor_model_parallel_rank())

    @property
    def data_rank(self) -> int:
        """Place among the ranks that hold the same tensor-parallel part."""
        return int(parallel_state.get_data_parallel_rank())

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.info.rank == 0

    def describe(self) -> str:
        """How errors and logs name this rank."""
        return (
            f"rank {self.info.rank}/{self.info.world_size} "
            f"(stage 0, tp {self.tensor_rank}, dp {self.data_rank})"
        )

    # What DeepSpeed calls on an `mpu`.

    def get_model_parallel_rank(self) -> int:
        """Tensor-parallel rank."""
        return self.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        """Tensor-parallel size."""
        return self.tensor_size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """The group over which the global gradient norm is summed."""
        return parallel_state.get_tensor_model_parallel_group()

    def get_tensor_model_parallel_rank(self) -> int:
        """Tensor-parallel rank."""
        return self.tensor_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        """Tensor-parallel size."""
        return self.tensor_size

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        """Tensor-parallel group."""
        return parallel_state.get_tensor_model_parallel_group()

    def get_data_parallel_rank(self) -> int:
        """Data-parallel rank."""
        return self.data_rank

    def get_data_parallel_world_size(self) -> int:
        """Data-parallel size."""
        return self.data_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The group over which ZeRO partitions and gradients are averaged."""
        return parallel_state.get_data_parallel_group()

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks of the data-parallel group."""
        return self._data_parallel_ranks


def start_process_group(info: RankInfo, device: torch.device, timeout_s: float) -> None:
    """Join the job's process group: NCCL on GPUs, gloo on CPUs.

    Raises:
        ConfigError: the rendezvous failed (port taken, main node not reached).
    """
    address = os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    port = os.environ.setdefault("MASTER_PORT", "29500")
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
