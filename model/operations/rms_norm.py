"""RMSNorm (Zhang and Sennrich 2019), with statistics in float32 and one rounding at the end.

On a GPU torch has a fused kernel, which keeps the input and one number a position for backward. On
a CPU it has not: there `F.rms_norm` is a chain of operations that keeps five tensors. The function
here keeps what the kernel keeps, so that memory is the same on both.

Legend: H hidden.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.operations.compiled import compiled


class RMSNorm(nn.Module):
    """`rms_norm` with a weight; built by megatron's layer from the layer spec."""

    def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.eps = eps
        self._function: Callable[..., Tensor] = rms_norm

    def compile_kernel(self) -> None:
        """Compute with a kernel that torch.compile makes."""
        self._function = compiled(plain_rms_norm)

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalize `[..., H]`."""
        return self._function(hidden, self.weight, self.eps)


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`hidden / sqrt(mean(hidden^2) + eps) * weight` over the last dimension.

    Args:
        hidden: `[..., H]`.
        weight: `[H]`, in the same dtype.
        eps: added to the mean of squares.
    """
    if hidden.is_cuda:
        return F.rms_norm(hidden, (hidden.shape[-1],), weight, eps)
    result: Tensor = _RMSNorm.apply(hidden, weight, eps)
    return result


def plain_rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` as it is defined, to be compiled."""
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    scale = (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return (wide * scale * weight).to(hidden.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        scale = wide.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        return (wide * scale).mul_(weight).to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, scale = ctx.saved_tensors
        (grad_output,) = grad_outputs
        grad_output, normed = grad_output.to(scale.dtype), hidden.to(scale.dtype) * scale
        of_hidden = of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (grad_output * normed).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            wanted = grad_output * weight
            along = (wanted * normed).mean(-1, keepdim=True)
            of_hidden = wanted.addcmul_(normed, along, value=-1).mul_(scale).to(hidden.dtype)
        return of_hidden, of_weight, None
