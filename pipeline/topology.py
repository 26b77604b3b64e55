"""Which rank does what: the process groups, and DeepSpeed's view of them."""

import math

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from pipeline.launch import RankInfo


class Topology:
    """The grid of ranks: tensor-parallel ranks are neighbours, data-parallel ones apart.

    Also the `mpu` object that DeepSpeed asks for groups (megatron's own lacks names it wants).

    Args:
        info: this rank's place.
        tensor_size: tensor-parallel size; divides the world size.
        device: where this rank computes.
        timeout_s: after this a collective that is not answered fails.

    Attributes:
        info: this rank's place.
        tensor_size: tensor-parallel size.
        data_size: data-parallel size.
        device: where this rank computes.
    """

    def __init__(
        self, info: RankInfo, tensor_size: int, device: torch.device, *, timeout_s: float = 600.0
    ) -> None:
        self.info = info
        self.device = device
        self.tensor_size = tensor_size
        self.data_size = info.world_size // tensor_size
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor_size,
            distributed_timeout_minutes=math.ceil(timeout_s / 60),
        )
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
