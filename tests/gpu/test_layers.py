"""What a layer computes with, on the device: its functions, attention's kernels, copied batches."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_prep.loading.loader import Batch
from model.errors import ConfigError
from model.loss import product_adds_in_float32
from model.operations.attention import attend
from model.operations.attention_backend import (
    AttentionShape,
    BackendChoice,
    can_use_on,
    choose_backend,
)
from model.operations.compiled import compiled
from model.operations.documents import bias_within
from model.operations.rms_norm import plain_rms_norm, rms_norm
from model.operations.rotary import RotaryTable
from model.operations.self_attention import split_and_rotate
from model.operations.swiglu import swiglu
from pipeline.data.batch_order import BatchPosition, StepBatches
from pipeline.data.device_copies import batches_on
from tests.support.parity_runs import relative_difference

LENGTH, BATCH, HIDDEN, WIDTH = 256, 2, 512, 64
# One rounding in bf16 is 2^-9 of a number; each function has up to three.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
DTYPES = tuple(TOLERANCE)


def made(*size: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Random numbers on the CPU, of the dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator).to(dtype)


def assert_same(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """As a share of the expected tensor's norm."""
    assert relative_difference(found.detach().double().cpu(), expected.detach()) < tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_compiled", [False, True])
def test_swiglu_and_norm_follow_float64(
    device: torch.device, dtype: torch.dtype, is_compiled: bool
) -> None:
    """Outputs and gradients, against the same functions of the same inputs by autograd."""
    gate_and_up = made(LENGTH, BATCH, 2 * HIDDEN, dtype=dtype)
    hidden, weight = made(LENGTH, BATCH, HIDDEN, dtype=dtype), made(HIDDEN, dtype=dtype, seed=2)
    upstream = made(LENGTH, BATCH, HIDDEN, dtype=dtype, seed=3)

    def run(where: torch.device, kind: torch.dtype, ours: bool) -> list[Tensor]:
        inputs = [t.to(where, kind).requires_grad_() for t in (gate_and_up, hidden, weight)]
        gate, up = inputs[0].chunk(2, dim=-1)
        norm = rms_norm if ours else plain_rms_norm
        if ours and is_compiled:
            norm = compiled(plain_rms_norm)
        activated = swiglu(inputs[0], is_compiled) if ours else F.silu(gate) * up
        normed = norm(inputs[1], inputs[2], 1e-5)
        torch.autograd.backward([activated, normed], [upstream.to(where, kind)] * 2)
        gradients = [tensor.grad for tensor in inputs if tensor.grad is not None]
        assert len(gradients) == len(inputs)
        return [activated, normed, *gradients]

    expected = run(torch.device("cpu"), torch.float64, ours=False)
    for found, wanted in zip(run(device, dtype, ours=True), expected, strict=True):
        assert found.dtype == dtype
        assert_same(found, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows_differ", [False, True])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_rotation_follows_float64(
    device: torch.device, dtype: torch.dtype, rows_differ: bool, is_compiled: bool
) -> None:
    """Against a CPU in float64, which test_self_attention.py holds to a Llama's."""
    groups, per_group = 2, 3
    mixed = made(LENGTH, BATCH, groups * (per_group + 2) * WIDTH, dtype=dtype)
    positions = torch.arange(LENGTH)
    if rows_differ:
        positions = torch.stack((positions, positions % 100))
    table = RotaryTable(WIDTH, 10000.0)

    def run(where: torch.device, kind: torch.dtype, is_compiled: bool = False) -> list[Tensor]:
        product = mixed.to(where, kind).requires_grad_()
        rotation = table.rotation(positions.to(where), kind)
        parts = split_and_rotate(product, rotation, groups, is_compiled)
        torch.autograd.backward(parts, [part.detach().square() for part in parts])
        assert product.grad is not None
        return [*parts, product.grad]

    expected = run(torch.device("cpu"), torch.float64)
    for found, wanted in zip(run(device, dtype, is_compiled), expected, strict=True):
        # The cosines are of dtype, too; the gradient's upstream has been rounded before.
        assert_same(found, wanted, 4 * TOLERANCE[dtype])


@pytest.mark.parametrize("choice", ["auto", "cudnn", "flash", "efficient", "math"])
@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.filterwarnings("ignore")  # torch gives the reasons of a refusal as warnings
def test_every_kernel_of_attention_agrees(
    device: torch.device, choice: BackendChoice, kv_heads: int
) -> None:
    """In bf16, outputs and gradients against float64; auto is never refused."""
    shape = AttentionShape(8, kv_heads, WIDTH, torch.bfloat16)
    try:
        backend = choose_backend(choice, shape, can_use_on(device))
    except ConfigError:
        assert choice not in ("auto", "math")
        pytest.skip(f"torch cannot use {choice} here")
    heads = [
        made(LENGTH, BATCH, count, WIDTH, dtype=torch.bfloat16, seed=count + place)
        for place, count in enumerate((8, kv_heads, kv_heads))
    ]
    upstream = made(LENGTH, BATCH, 8 * WIDTH, dtype=torch.bfloat16, seed=9)

    def run(where: torch.device, kind: torch.dtype, ours: bool) -> list[Tensor]:
        inputs = [part.to(where, kind).requires_grad_() for part in heads]
        output = attend(inputs[0], inputs[1], inputs[2], None, backend if ours else None)
        gradients = torch.autograd.grad(output, inputs, upstream.to(where, kind))
        return [output, *gradients]

    expected = run(torch.device("cpu"), torch.float64, ours=False)
    for found, wanted in zip(run(device, torch.bfloat16, ours=True), expected, strict=True):
        assert_same(found, wanted, 2e-2)


@pytest.mark.parametrize("length", [192, 261])
@pytest.mark.parametrize("has_bias", [False, True])
def test_attention_of_any_length(device: torch.device, length: int, has_bias: bool) -> None:
    """Sequences that are no multiple of 128, grouped queries, and scores far below 0.

    There versions of cuDNN's kernel had gradients that are no numbers.
    """
    shape = AttentionShape(8, 2, WIDTH, torch.bfloat16)
    backend = choose_backend("auto", shape, can_use_on(device))
    documents = torch.arange(length).expand(BATCH, -1) // 100
    heads = [
        made(length, BATCH, count, WIDTH, dtype=torch.bfloat16, seed=count + place)
        for place, count in enumerate((8, 2, 2))
    ]
    heads[0][..., 0], heads[1][..., 0] = 8.0, -120.0
    upstream = made(length, BATCH, 8 * WIDTH, dtype=torch.bfloat16, seed=9)

    def run(where: torch.device, kind: torch.dtype, ours: bool) -> list[Tensor]:
        inputs = [part.to(where, kind).requires_grad_() for part in heads]
        bias = bias_within(documents.to(where), kind) if has_bias else None
        output = attend(inputs[0], inputs[1], inputs[2], bias, backend if ours else None)
        return [output, *torch.autograd.grad(output, inputs, upstream.to(where, kind))]

    expected = run(torch.device("cpu"), torch.float64, ours=False)
    for found, wanted in zip(run(device, torch.bfloat16, ours=True), expected, strict=True):
        assert bool(found.isfinite().all())
        # Roundings of the scores' gradient meet keys of -120.
        assert_same(found, wanted, 0.1)


def test_product_adds_in_float32(device: torch.device) -> None:
    """Where this torch has such a product; the run's log says where it has not."""
    if not product_adds_in_float32(device):
        pytest.skip(f"torch {torch.__version__} has no such product on {device.type}")
    left = made(LENGTH, HIDDEN, dtype=torch.bfloat16).to(device)
    right = made(LENGTH, HIDDEN, dtype=torch.bfloat16, seed=2).to(device)
    total = torch.full((HIDDEN, HIDDEN), 100.0, device=device)
    torch.addmm(total, left.t(), right, out_dtype=torch.float32, out=total)
    expected = 100.0 + left.double().cpu().t() @ right.double().cpu()
    torch.testing.assert_close(total.double().cpu(), expected, rtol=0, atol=1e-3)


def test_copied_batches_arrive(device: torch.device) -> None:
    """Every step in order, on the device, with documents where there are some."""

    def step(number: int) -> StepBatches:
        tokens = torch.full((2, 300), number)
        documents = tokens.int() if number % 2 == 0 else None
        batch = Batch(tokens, tokens.repeat(3, 1, 1), documents)
        return StepBatches(BatchPosition(number, 0, 0), [batch, batch])

    steps = (step(number) for number in range(1, 8))
    count = 0
    for count, found in enumerate(batches_on(device, steps), 1):
        assert found.position.batch == count
        for batch in found.micro_batches:
            assert batch.tokens.device == batch.labels.device == device
            assert bool((batch.tokens == count).all() & (batch.labels == count).all())
            assert (batch.documents is None) == (count % 2 == 1)
    assert count == 7
