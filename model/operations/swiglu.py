"""SwiGLU (Shazeer 2020): silu(gate) * up, keeping for backward nothing but its input.

Left to autograd, each layer would keep gate, up, and silu(gate) apart from them.

Legend: f feed-forward width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.operations.compiled import compiled


class SwiGLU(nn.Module):
    """`swiglu` as a module, as megatron's MLP takes its activation from a layer spec."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self._function: Callable[[Tensor], Tensor] = swiglu

    def compile_kernel(self) -> None:
        """Compute with a kernel that torch.compile makes."""
        self._function = compiled(plain_swiglu)

    def forward(self, gate_and_up: Tensor) -> Tensor:
        """`[..., 2 f]`, gate before up, to `[..., f]`."""
        return self._function(gate_and_up)


def swiglu(gate_and_up: Tensor) -> Tensor:
    """silu(gate) * up of `[..., 2 f]`, gate before up: `[..., f]`."""
    result: Tensor = _SwiGLU.apply(gate_and_up)
    return result


def plain_swiglu(gate_and_up: Tensor) -> Tensor:
    """`swiglu` as it is defined, to be compiled; one rounding at the end."""
    wide = gate_and_up.to(torch.promote_types(gate_and_up.dtype, torch.float32))
    gate, up = wide.chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_and_up.dtype)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (gate_and_up,) = ctx.saved_tensors
        (grad_output,) = grad_outputs
        gate, up = gate_and_up.chunk(2, dim=-1)
        gradient = torch.empty_like(gate_and_up, memory_format=torch.contiguous_format)
        of_gate, of_up = gradient.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad_output, out=of_up)
        torch.ops.aten.silu_backward.grad_input(grad_output * up, gate, grad_input=of_gate)
        return gradient
