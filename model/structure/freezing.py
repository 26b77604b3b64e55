"""Which parameters are trained: all, or what is added to a model that stays as it is.

Freezing the trunk freezes the whole next-token model with it: embedding, trunk, head 1, final norm
and unembedding. What the model says next is then the same before and after, to the bit, and heads
2 .. n learn to draft for it (the setting of Medusa-1, Cai et al. 2024).

Of a model that is given a memory, the memory's own parameters may be trained alone.
"""

from typing import Literal

from torch import nn

from model.memory.prompts import MEMORY
from model.structure.parameter_shapes import head_of

Freeze = Literal["none", "trunk", "all_but_memory"]


def is_trained(name: str, freeze: Freeze) -> bool:
    """Whether the optimizer has the parameter of this name."""
    if freeze == "all_but_memory":
        return name.startswith(MEMORY)
    return freeze == "none" or head_of(name) > 1


def freeze_parameters(model: nn.Module, freeze: Freeze) -> None:
    """Let frozen parameters ask for no gradient, so that no graph is kept for them."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, freeze))
