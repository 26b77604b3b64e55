"""AdamW over what is trained, and clipping where DeepSpeed does not clip."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from model.structure.sharding import placement_of
from pipeline.config.sections import OptimizerSection
from pipeline.distributed.topology import Topology

_UNDECAYED = ("layernorm.weight", "norm_weight")


def build_adamw(model: nn.Module, options: OptimizerSection) -> torch.optim.AdamW:
    """AdamW in two groups: matrices decay, norm weights do not.

    Fused, as it reads and writes everything once and needs no memory of its own.

    Args:
        model: its parameters that require gradients are trained.
        options: of the run.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decayed = [p for name, p in parameters.items() if not name.endswith(_UNDECAYED)]
    undecayed = [p for name, p in parameters.items() if name.endswith(_UNDECAYED)]
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=options.learning_rate,
        betas=options.betas,
        eps=options.eps,
        fused=True,
    )


def clip_whole_gradients(
    parameters: Iterable[tuple[str, nn.Parameter]], limit: float, topology: Topology
) -> float:
    """Scale this rank's whole gradients down to a global norm; a collective.

    Without ZeRO DeepSpeed reports no norm, or one that misses tensor-parallel parts. With ZeRO it
    computes the norm of its partitions, in float64.

    Args:
        parameters: of this rank's part of the model, by name; those without a gradient count 0.
        limit: largest norm; 0 = no clipping.
        topology: tensor-parallel ranks and stages hold the rest of the model.

    Returns:
        The global norm before clipping; not finite if the gradients, or their squares, are not.
        Gradients are left alone then.
    """
    # A CPU's fp32 norm adds squares up one after the other: for millions it is off by 1e-5.
    dtype = torch.float64 if topology.device.type == "cpu" else torch.float32
    square = torch.zeros((), dtype=dtype, device=topology.device)
    gradients = []
    for name, parameter in parameters:
        if parameter.grad is None:
            continue
        gradients.append(parameter.grad)
        if placement_of(name).dim is not None or topology.tensor_rank == 0:
            square += torch.linalg.vector_norm(parameter.grad, dtype=dtype).square()
    dist.all_reduce(square, group=topology.get_model_parallel_group())
    norm = float(square.sqrt())
    if limit and limit < norm < float("inf"):
        torch._foreach_mul_(gradients, limit / (norm + 1e-6))
    return norm
