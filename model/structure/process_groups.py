"""A world of one process, for tools that use the model outside a training run."""

import torch.distributed as dist
from megatron.core import parallel_state


def ensure_single_process() -> None:
    """Start torch.distributed and megatron's groups for this process alone, if nothing runs yet.

    megatron-core's layers ask for their tensor-parallel group even when there is only one rank.
    """
    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=1)
