"""Which rank does what: the process groups, and DeepSpeed's view of them."""

import math
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from model.structure.part import ModelPart
from pipeline.distributed.rendezvous import RankInfo


class Topology:
    """The grid of ranks: stages x data x tensor, tensor-parallel ranks next to each other.

    Rank (stage * data_size + data_rank) * tensor_size + tensor_rank. The ranks of one column, the
    same data and tensor rank in every stage, form a chain along which activations and gradients
    travel.

    Also the `mpu` object that DeepSpeed asks for groups (megatron's own lacks names that it needs).

    Args:
        info: this rank's position.
        tensor_size: tensor-parallel size.
        device: where this rank computes.
        plan: what each stage holds; None = one stage that holds everything. The number of stages
            times `tensor_size` divides the world size.
        timeout_s: after this a collective that is not answered fails.

    Attributes:
        info: this rank's position.
        tensor_size: tensor-parallel size.
        data_size: data-parallel size.
        num_stages: pipeline stages.
        device: where this rank computes.
        plan: what each stage holds; empty for one stage.
        activation_group: the chain, for what goes to the next stage; None for one stage.
        gradient_group: the chain again, for what comes back: neighbors that send to each other
            at the same time must not wait in one queue.
        head_group: the ranks of the chain whose stages have heads; None if this one has not, or
            it is the only one.
    """

    def __init__(
        self,
        info: RankInfo,
        tensor_size: int,
        device: torch.device,
        *,
        plan: Sequence[ModelPart] = (),
        timeout_s: float = 600.0,
    ) -> None:
        self.info = info
        self.device = device
        self.tensor_size = tensor_size
        self.plan = tuple(plan) if len(plan) > 1 else ()
        self.num_stages = max(len(self.plan), 1)
        self._timeout = timedelta(seconds=timeout_s)
        self.data_size = info.world_size // (tensor_size * self.num_stages)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor_size,
            pipeline_model_parallel_size=self.num_stages,
            distributed_timeout_minutes=math.ceil(timeout_s / 60),
            # Beside NCCL's groups nobody uses them, and each holds sockets to all its ranks.
            create_gloo_process_groups=False,
        )
        ranks: list[int] = dist.get_process_group_ranks(parallel_state.get_data_parallel_group())
        self._data_parallel_ranks = ranks
        self.activation_group: dist.ProcessGroup | None = None
        self.gradient_group: dist.ProcessGroup | None = None
        self.head_group: dist.ProcessGroup | None = None
        if self.plan:
            self._make_chain_groups()

    def _make_chain_groups(self) -> None:
        """The groups of every chain; all ranks make all of them, in the same order."""
        column_size = self.data_size * self.tensor_size
        heads = [stage for stage, part in enumerate(self.plan) if part.heads]
        for column in range(column_size):
            chain = [stage * column_size + column for stage in range(self.num_stages)]
            for name in ("activation_group", "gradient_group"):
                group = dist.new_group(chain, timeout=self._timeout)
                if self.info.rank in chain:
                    setattr(self, name, group)
            if len(heads) > 1:
                members = [chain[stage] for stage in heads]
                group = dist.new_group(members, timeout=self._timeout)
                if self.info.rank in members:
                    self.head_group = group

    def neighbors(self, size: int) -> dist.ProcessGroup | None:
        """A new group of this rank and the data-parallel ranks beside it; None for one alone.

        A collective: every rank makes the groups of all.

        Args:
            size: ranks of a group; divides the data-parallel size.
        """
        if size == 1:
            return None
        mine = None
        for column in range(self.num_stages * self.tensor_size):
            stage, tensor = divmod(column, self.tensor_size)
            for first in range(0, self.data_size, size):
                ranks = [
                    (stage * self.data_size + data) * self.tensor_size + tensor
                    for data in range(first, first + size)
                ]
                group = dist.new_group(ranks, timeout=self._timeout)
                if self.info.rank in ranks:
                    mine = group
        return mine

    @property
    def stage(self) -> int:
        """This rank's pipeline stage, from 0."""
        return int(parallel_state.get_pipeline_model_parallel_rank())

    @property
    def is_first_stage(self) -> bool:
        """Whether tokens enter here."""
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether no other stage reads what this one gives."""
        return self.stage == self.num_stages - 1

    def rank_of_stage(self, stage: int) -> int:
        """The rank of this chain in another stage."""
        column_size = self.data_size * self.tensor_size
        return stage * column_size + self.info.rank % column_size

    @property
    def lm_head_owner(self) -> int:
        """The rank of this chain whose stage trains the final norm and the unembedding."""
        return self.rank_of_stage(next(s for s, part in enumerate(self.plan) if part.owns_lm_head))

    def describe_rank(self, rank: int) -> str:
        """How errors and logs name any rank."""
        above, tensor = divmod(rank, self.tensor_size)
        stage, data = divmod(above, self.data_size)
        return f"rank {rank}/{self.info.world_size} (stage {stage}, tp {tensor}, dp {data})"

    @property
    def tensor_rank(self) -> int:
        """Index among the tensor-parallel ranks that share this model copy."""
        return int(parallel_state.get_tensor_model_parallel_rank())

    @property
    def data_rank(self) -> int:
        """Index among the ranks that hold the same tensor-parallel part."""
        return int(parallel_state.get_data_parallel_rank())

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.info.rank == 0

    def describe(self) -> str:
        """How errors and logs name this rank."""
        return self.describe_rank(self.info.rank)

    # What DeepSpeed calls on an `mpu`.

    def get_model_parallel_rank(self) -> int:
        """Tensor-parallel rank."""
        return self.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        """Tensor-parallel size."""
        return self.tensor_size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """The ranks of all stages and tensor parts that share their samples.

        DeepSpeed sums the global gradient norm over it and agrees there on overflow; the rank it
        counts copies by stays the tensor-parallel one, since no parameter lives in two stages.
        """
        return parallel_state.get_model_parallel_group()

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
