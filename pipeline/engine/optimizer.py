"""AdamW over what is trained."""

import torch
from torch import nn

from pipeline.config.sections import OptimizerSection

_UNDECAYED = ("layernorm.weight", "norm_weight")


def build_adamw(model: nn.Module, options: OptimizerSection, *, fused: bool) -> torch.optim.AdamW:
    """AdamW in two groups: matrices decay, norm weights do not.

    Args:
        model: its parameters that require gradients are trained.
        options: of the run.
        fused: one kernel for all parameters, on a GPU.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decayed = [p for name, p in parameters.items() if not name.endswith(_UNDECAYED)]
    undecayed = [p for name, p in parameters.items() if name.endswith(_UNDECAYED)]
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": options.weight_decay},
            {"params": undecayed, "weight_decay": 0.0},
        ],
        lr=options.learning_rate,
        betas=options.betas,
        eps=options.eps,
        fused=fused,
    )
