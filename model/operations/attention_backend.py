"""Which of torch's kernels computes attention on a GPU.

Torch's own order tries flash attention before cuDNN's, which is the faster one on Hopper and later.
A kernel may also refuse: by dtype, by head dimension, or grouped queries. Then keys and values
repeated for each query still let it run, which costs less than the unfused `math`.

Legend: S sequence, A attention heads, G key-value heads, D head dimension; A and G are this
tensor-parallel rank's share.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)
from torch.nn.attention import SDPBackend

from model.errors import ConfigError

BackendChoice = Literal["auto", "cudnn", "flash", "efficient", "math"]

_BACKENDS: dict[str, SDPBackend] = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_CAN_USE: dict[str, Callable[[SDPAParams], bool]] = {
    "cudnn": can_use_cudnn_attention,
    "flash": can_use_flash_attention,
    "efficient": can_use_efficient_attention,
    "math": lambda _: True,
}
_PROBED_LENGTH = 128
# Older versions of cuDNN read past the ends of sequences that are no multiple of 128: illegal
# accesses, or gradients that are no numbers (pytorch's issue 169849).
_CUDNN_OF_ANY_LENGTH = 91501
# With a bias, gradients of cuDNN up to 9.25 may be no numbers, either (pytorch's issue 196678).
KERNELS_WITH_BIAS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class AttentionShape(NamedTuple):
    """What decides whether a kernel can be used, besides the GPU.

    Attributes:
        heads: A.
        kv_heads: G.
        head_dim: D.
        dtype: of queries, keys and values.
    """

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype


class AttentionBackend(NamedTuple):
    """The kernel that attention runs on.

    Attributes:
        name: of the kernel.
        order: it, and what may take its place where it refuses a call.
        repeats: repeat keys and values for each query, since the kernel takes no groups.
    """

    name: str
    order: list[SDPBackend]
    repeats: bool

    def kernels(self, length: int) -> list[SDPBackend]:
        """The order for sequences of this length; without cuDNN where its version has not it."""
        version = torch.backends.cudnn.version() or _CUDNN_OF_ANY_LENGTH
        if length % 128 == 0 or version >= _CUDNN_OF_ANY_LENGTH or len(self.order) == 1:
            return self.order
        return [kernel for kernel in self.order if kernel != SDPBackend.CUDNN_ATTENTION]

    def __str__(self) -> str:
        return self.name + (", keys and values repeated for each query" if self.repeats else "")


# Whether a kernel takes causal attention of this shape, with grouped queries or repeated keys.
CanUse = Callable[[str, AttentionShape, bool], bool]


def choose_backend(
    choice: BackendChoice, shape: AttentionShape, can_use: CanUse
) -> AttentionBackend:
    """The first kernel of cuDNN's, flash, memory-efficient and unfused attention that can be used.

    Args:
        choice: one of them, or auto.
        shape: of the model's attention.
        can_use: asks torch; the last argument says whether queries are grouped.

    Raises:
        ConfigError: the chosen one cannot be used.
    """
    names = list(_BACKENDS) if choice == "auto" else [choice]
    for place, name in enumerate(names):
        grouped = shape.heads != shape.kv_heads
        order = [_BACKENDS[other] for other in names[place:]]
        if can_use(name, shape, grouped):
            return AttentionBackend(name, order, repeats=False)
        if grouped and can_use(name, shape._replace(kv_heads=shape.heads), False):
            return AttentionBackend(name, order, repeats=True)
    raise ConfigError(
        f"train.attention={choice} cannot be used on this GPU with {shape.heads} heads of "
        f"{shape.head_dim} in {str(shape.dtype).removeprefix('torch.')}; set train.attention=auto"
    )


def can_use_on(device: torch.device) -> CanUse:
    """Ask torch about kernels of this GPU, for training."""

    def can_use(name: str, shape: AttentionShape, grouped: bool) -> bool:
        def part(heads: int) -> Tensor:
            size = (_PROBED_LENGTH, 1, heads, shape.head_dim)
            made = torch.empty(size, dtype=shape.dtype, device=device, requires_grad=True)
            return made.permute(1, 2, 0, 3)

        keys = (part(shape.kv_heads), part(shape.kv_heads))
        params = SDPAParams(part(shape.heads), *keys, None, 0.0, True, grouped)
        return _CAN_USE[name](params)

    return can_use
