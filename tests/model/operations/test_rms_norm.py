"""RMSNorm on a CPU against torch's, and what it keeps."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.saved_tensors import SavedTensorMeter
from model.operations.rms_norm import rms_norm

EPS, WIDTH = 1e-5, 96


def make_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`[S, B, H]` whose rows are of very different lengths, one of them zeros; weights `[H]`."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(6, 2, WIDTH, generator=generator, dtype=torch.float64)
    hidden = hidden * 10.0 ** torch.arange(-3, 3).view(6, 1, 1)
    hidden[2, 1] = 0
    weight = 1 + torch.randn(WIDTH, generator=generator, dtype=torch.float64) / 4
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


def torchs(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What runs on a GPU."""
    return F.rms_norm(hidden, (hidden.shape[-1],), weight, eps)


def test_passes_gradcheck() -> None:
    """For hidden states and weight together."""
    assert torch.autograd.gradcheck(lambda h, w: rms_norm(h, w, EPS), make_inputs(torch.float64))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_equals_torchs(dtype: torch.dtype, tolerance: float) -> None:
    """Output and both gradients."""
    inputs = make_inputs(dtype)
    found, expected = rms_norm(*inputs, EPS), torchs(*inputs, EPS)
    weights = torch.linspace(-1, 1, found.numel()).view(found.shape).to(dtype)
    ours, theirs = (torch.autograd.grad(out, inputs, weights) for out in (found, expected))
    for one, other in ((found, expected), *zip(ours, theirs, strict=True)):
        assert one.dtype == dtype
        assert (one - other).norm() <= tolerance * other.norm()


def test_bf16_has_statistics_in_float32() -> None:
    """Output and gradients are one rounding, 2^-9, from those of the same inputs in float64."""
    inputs = make_inputs(torch.bfloat16)
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in inputs)
    found, expected = rms_norm(*inputs, EPS), torchs(hidden, weight, EPS)
    weights = torch.linspace(-1, 1, found.numel()).view(found.shape).bfloat16()
    ours = torch.autograd.grad(found, inputs, weights)
    theirs = torch.autograd.grad(expected, (hidden, weight), weights.double())
    for one, other in ((found, expected), *zip(ours, theirs, strict=True)):
        assert one.dtype == torch.bfloat16
        assert (one - other).norm() <= 2**-9 * other.norm()


def test_frozen_weight_and_frozen_input_get_no_gradient() -> None:
    """Only what is asked for is computed."""
    hidden, weight = make_inputs(torch.float64)
    rms_norm(hidden, weight.detach(), EPS).sum().backward()
    assert hidden.grad is not None
    rms_norm(hidden.detach(), weight, EPS).sum().backward()
    assert weight.grad is not None


def test_keeps_its_input_and_one_number_a_position() -> None:
    """As torch's kernel does on a GPU."""
    hidden, weight = make_inputs(torch.float32)
    with SavedTensorMeter(excluded=[hidden, weight]) as meter:
        rms_norm(hidden, weight, EPS).sum().backward()
    assert meter.peak == 6 * 2 * 4
