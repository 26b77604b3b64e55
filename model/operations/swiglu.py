"""SwiGLU (Shazeer 2020): silu(gate) * up, keeping for backward nothing but its input.

Left to autograd, each layer would keep gate, up, and silu(gate) apart from them.

Legend: f feed-forward width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.operations.compiled import compiled


class SwiGLU(nn.Module):
    """`swiglu` as a module, as megatron's MLP takes its activation from a layer spec."""

    _compiled = False

    def __init__(self, config: Any) -> None:
        super().__init__()

    def compile_kernel(self) -> None:
        """Compute with kernels that torch.compile makes."""
        self._compiled = True

    def forward(self, gate_and_up: Tensor) -> Tensor:
        """`[..., 2 f]`, gate before up, to `[..., f]`."""
        return swiglu(gate_and_up, self._compiled)


def swiglu(gate_and_up: Tensor, is_compiled: bool = False) -> Tensor:
    """silu(gate) * up of `[..., 2 f]`, gate before up: `[..., f]`.

    Args:
        gate_and_up: `[..., 2 f]`.
        is_compiled: by kernels that torch.compile makes, with one rounding at the end.
    """
    result: Tensor = _SwiGLU.apply(gate_and_up, is_compiled)
    return result


def plain_swiglu(gate_and_up: Tensor) -> Tensor:
    """`swiglu` as it is defined, to be compiled; one rounding at the end."""
    wide = gate_and_up.to(torch.promote_types(gate_and_up.dtype, torch.float32))
    gate, up = wide.chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_and_up.dtype)


def plain_swiglu_gradient(gate_and_up: Tensor, grad_output: Tensor) -> Tensor:
    """The gradient of `swiglu`, to be compiled: `[..., 2 f]`.

    Autograd would concatenate both halves, in a kernel that computes either for every number of
    the result: twice the exponentials and divisions.
    """
    halves = gate_and_up.unflatten(-1, (2, -1))
    dtype = torch.promote_types(gate_and_up.dtype, torch.float32)
    gate, up, upstream = (
        part.expand_as(halves).to(dtype)
        for part in (*halves.split(1, dim=-2), grad_output.unsqueeze(-2))
    )
    share = torch.sigmoid(gate)
    of_gate = upstream * up * share * (1 + gate * (1 - share))
    of_up = upstream * gate * share
    is_gate = torch.arange(2, device=gate.device).unsqueeze(1) == 0
    return torch.where(is_gate, of_gate, of_up).to(gate_and_up.dtype).flatten(-2)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor, is_compiled: bool) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        ctx.is_compiled = is_compiled
        if is_compiled:
            activated: Tensor = compiled(plain_swiglu)(gate_and_up)
            return activated
        gate, up = gate_and_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gate_and_up,) = ctx.saved_tensors
        (grad_output,) = grad_outputs
        if ctx.is_compiled:
            return compiled(plain_swiglu_gradient)(gate_and_up, grad_output), None
        gate, up = gate_and_up.chunk(2, dim=-1)
        gradient = torch.empty_like(gate_and_up, memory_format=torch.contiguous_format)
        of_gate, of_up = gradient.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad_output, out=of_up)
        torch.ops.aten.silu_backward.grad_input(grad_output * up, gate, grad_input=of_gate)
        return gradient, None
