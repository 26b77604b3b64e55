"""Which parameters are trained: all of them, or what is added to a model that stays as it is.

none        everything
trunk       heads 2 .. n, on a next-token model that stays: embedding, trunk, head 1, final norm and
            unembedding. What it says next is the same before and after, to the bit, and the heads
            learn to draft for it (the setting of Medusa-1, Cai et al. 2024).
early_exit  head 1, on the first layers of a model and its LM head, which stay. It learns to draft
            for the whole model (the adapter of Kangaroo, Liu et al. 2024).
all_but_memory  what a memory adds to a model, which else stays as it is: its own parameters and
            low-rank adapters, if it has them.
"""

from typing import TYPE_CHECKING, Literal

from model.memory.adapters import is_adapter
from model.memory.sizes import MEMORY
from model.structure.parameter_shapes import head_of

if TYPE_CHECKING:  # plans and configurations need no torch
    from torch import nn

Freeze = Literal["none", "trunk", "early_exit", "all_but_memory"]


def is_trained(name: str, freeze: Freeze) -> bool:
    """Whether the optimizer has the parameter of this name."""
    if freeze == "all_but_memory":
        return name.startswith(MEMORY) or is_adapter(name)
    return is_head_trained(head_of(name), freeze)


def is_head_trained(head: int, freeze: Freeze) -> bool:
    """Whether what belongs to a head alone is trained; 0 stands for trunk and LM head."""
    least = {"none": 0, "trunk": 2, "early_exit": 1, "all_but_memory": 1 << 30}
    return head >= least[freeze]


def heads_trained_alone(num_heads: int, freeze: Freeze) -> int | None:
    """How many heads are trained while everything else stays.

    None where nothing is frozen, or where gradients pass all of it on their way to the memory.
    """
    if freeze in ("none", "all_but_memory"):
        return None
    return sum(is_head_trained(head, freeze) for head in range(1, num_heads + 1))


def freeze_parameters(model: "nn.Module", freeze: Freeze) -> None:
    """Let frozen parameters ask for no gradient, so that no graph is kept for them."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, freeze))
