"""SwiGLU against silu(gate) * up as autograd differentiates it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.saved_tensors import SavedTensorMeter
from model.operations.swiglu import swiglu


def make_input(dtype: torch.dtype) -> Tensor:
    """`[S, B, 2 f]`, with gates from far below 0 to far above."""
    gate = torch.linspace(-30, 30, 5 * 2 * 8, dtype=torch.float64).view(5, 2, 8)
    generator = torch.Generator().manual_seed(2)
    up = torch.randn(gate.shape, generator=generator, dtype=torch.float64)
    return torch.cat((gate, up), dim=-1).to(dtype).requires_grad_()


def written_out(gate_and_up: Tensor) -> Tensor:
    """As autograd has it."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-7)]
)
def test_equals_silu_of_gate_times_up(dtype: torch.dtype, tolerance: float) -> None:
    """Output to the bit, gradient up to the order of its products; bf16 rounds twice."""
    inputs = make_input(dtype)
    found, expected = swiglu(inputs), written_out(inputs)
    assert torch.equal(found, expected)
    weights = torch.linspace(-1, 1, found.numel()).view(found.shape).to(dtype)
    ours, theirs = (torch.autograd.grad(out, inputs, weights)[0] for out in (found, expected))
    assert (ours - theirs).norm() <= tolerance * theirs.norm()
    assert ours.dtype == dtype


def test_passes_gradcheck() -> None:
    """In float64, with a gradient in any memory format."""
    assert torch.autograd.gradcheck(
        lambda x: swiglu(x).transpose(0, 2).contiguous(), make_input(torch.float64)
    )


def test_keeps_its_input_alone() -> None:
    """Autograd also keeps silu(gate)."""
    kept = []
    for function in (swiglu, written_out):
        with SavedTensorMeter() as meter:
            function(make_input(torch.float32).exp()).sum().backward()
        kept.append(meter.peak)
    assert kept[1] == pytest.approx(1.5 * kept[0])
