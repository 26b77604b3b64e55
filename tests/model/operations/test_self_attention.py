"""Queries, keys and values from one product, against slices and transformers' rotation."""

import pytest
import torch
from torch import Tensor
from transformers.models.llama import modeling_llama

from benchmarks.saved_tensors import SavedTensorMeter
from model.operations.rotary import RotaryTable, Rotation
from model.operations.self_attention import split_and_rotate

LENGTH, BATCH, GROUPS, WIDTH = 7, 2, 2, 6


def make_product(per_group: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """`[S, B, G * (R + 2) * D]`."""
    generator = torch.Generator().manual_seed(3)
    columns = GROUPS * (per_group + 2) * WIDTH
    product = torch.randn(LENGTH, BATCH, columns, generator=generator, dtype=torch.float64)
    return product.to(dtype).requires_grad_()


def make_rotation(rows_differ: bool, dtype: torch.dtype = torch.float64) -> Rotation:
    """Of positions 0 .. S-1, or of others in each sequence."""
    positions = torch.arange(LENGTH)
    if rows_differ:
        positions = torch.stack((positions, (positions + 3) % 5))
    return RotaryTable(WIDTH, 10000.0).rotation(positions, dtype)


def written_out(mixed: Tensor, rotation: Rotation, groups: int) -> tuple[Tensor, ...]:
    """The same by slices, `torch.cat`, and transformers' rotation."""
    width = 2 * rotation.cos.shape[-1]
    parts = mixed.view(*mixed.shape[:2], groups, -1, width)
    query = torch.cat([parts[:, :, group, :-2] for group in range(groups)], dim=2)
    cos, sin = (torch.cat((part, part), dim=-1)[:, :, 0].transpose(0, 1) for part in rotation)
    by_head = (query.permute(1, 2, 0, 3), parts[:, :, :, -2].permute(1, 2, 0, 3))
    turned = modeling_llama.apply_rotary_pos_emb(*by_head, cos, sin)
    return (*(part.permute(2, 0, 1, 3) for part in turned), parts[:, :, :, -1])


@pytest.mark.parametrize("per_group", [1, 3])
@pytest.mark.parametrize("rows_differ", [False, True])
def test_equals_split_and_llamas_rotation(per_group: int, rows_differ: bool) -> None:
    """Queries, keys and values, and the product's gradient."""
    mixed, rotation = make_product(per_group), make_rotation(rows_differ)
    found = split_and_rotate(mixed, rotation, GROUPS)
    expected = written_out(mixed, rotation, GROUPS)
    gradients: list[Tensor] = []
    for heads in (found, expected):
        weights = [torch.linspace(-1, 2, h.numel()).double().view(h.shape) for h in heads]
        total = torch.stack([(h * w).sum() for h, w in zip(heads, weights, strict=True)]).sum()
        gradients += torch.autograd.grad(total, mixed)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-14)
    assert float(gradients[1].abs().max()) > 0.1


def test_passes_gradcheck() -> None:
    """With gradients in any memory format."""
    rotation = make_rotation(rows_differ=True)

    def heads_first(mixed: Tensor) -> tuple[Tensor, ...]:
        parts = split_and_rotate(mixed, rotation, GROUPS)
        return tuple(part.permute(1, 2, 0, 3).contiguous() for part in parts)

    assert torch.autograd.gradcheck(heads_first, make_product(2))


def test_bf16_rounds_no_more_than_llama() -> None:
    """Both from bf16 cosines; the sum of both products is rounded once here, there also apart."""
    mixed = make_product(2, torch.bfloat16)
    rotation = make_rotation(rows_differ=False, dtype=torch.bfloat16)
    exact = written_out(mixed.double(), Rotation(*(t.double() for t in rotation)), GROUPS)
    found = split_and_rotate(mixed, rotation, GROUPS)
    llama = written_out(mixed, rotation, GROUPS)
    for ours, theirs, wanted in zip(found, llama, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - wanted).norm() <= (theirs - wanted).norm()
        assert (ours - wanted).norm() < 2**-8 * wanted.norm()


def test_nothing_of_the_product_is_kept() -> None:
    """Neither for the rotation's backward nor as the memory of what it gave."""
    mixed, rotation = make_product(2), make_rotation(rows_differ=False)
    with SavedTensorMeter(excluded=rotation) as meter:
        heads = split_and_rotate(mixed, rotation, GROUPS)
        torch.stack([part.sum() for part in heads]).sum().backward()
    assert meter.peak == 0
    memory = mixed.untyped_storage().data_ptr()
    assert all(part.untyped_storage().data_ptr() != memory for part in heads)
