"""Packed matrices give the products of plain ones, and every row's alone."""

import pytest
import torch
from torch import Tensor

from model.inference.products import (
    PackedMatrix,
    add_product,
    add_products,
    pack,
    pack_each,
    product,
    products,
)

ROWS = [1, 3, 16, 70]
SIZES = [(24, 40), (64, 96), (129, 33)]
# Half of bf16's distance between neighbours, and the sums' own rounding in fp32.
ROUNDING = 2.0**-8 + 1e-5


def drawn(*shape: int) -> Tensor:
    """Numbers that bf16 has, from a seed."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).bfloat16()


def near(found: Tensor, exact: Tensor) -> bool:
    """Whether each number is the exact one, rounded once."""
    size = exact.abs() + 1e-3 * exact.abs().max()  # sums that cancel have the rounding of addends
    return bool(((found.double() - exact).abs() <= ROUNDING * size).all())


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("sizes", SIZES)
def test_products_are_rounded_once(rows: int, sizes: tuple[int, int]) -> None:
    """Of one matrix and of several, alone and added to something."""
    inputs, outputs = sizes
    states, matrices = drawn(3, rows, inputs), drawn(3, inputs, outputs)
    total = drawn(3, rows, outputs)
    exact = states.double() @ matrices.double()
    assert near(products(states, pack_each(matrices)), exact)
    assert near(add_products(total, states, pack_each(matrices)), total.double() + exact)
    assert near(product(states[0], pack(matrices[0])), exact[0])
    assert near(add_product(total[0], states[0], pack(matrices[0])), total[0].double() + exact[0])
    shared = states[0].double() @ matrices.double()
    assert near(products(states[0], pack_each(matrices)), shared)
    assert not near(products(states, pack_each(matrices.flip(0))), exact)


def test_any_leading_sizes() -> None:
    """As the LM head is asked for heads, rows and positions at once; none at all, too."""
    states, matrix = drawn(2, 3, 5, 24), drawn(24, 40)
    assert near(product(states, pack(matrix)), states.double() @ matrix.double())
    assert product(states[:0], pack(matrix)).shape == (0, 3, 5, 40)


def test_only_bf16_on_a_cpu_is_packed() -> None:
    """And there only where the library has products for it."""
    assert isinstance(pack(torch.ones(4, 4)), Tensor)
    assert isinstance(pack_each(torch.ones(2, 4, 4, device="meta", dtype=torch.bfloat16)), Tensor)
    supported = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    assert isinstance(pack(drawn(4, 4)), PackedMatrix) == supported
