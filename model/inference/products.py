"""Products of few rows with weights, from the form in which the device reads them fastest.

A product with few rows takes as long as reading its matrix. In bf16 on a CPU torch.mm first lays
the matrix out anew for oneDNN, at each call; here that is done once, when it is read.

Legend: N rows, I inputs, O outputs, M matrices side by side.
"""

import torch
from torch import Tensor


class PackedMatrix:
    """A matrix in oneDNN's own layout, which only the products below can read.

    Args:
        matrix: `[I, O]`, bf16 on a CPU whose oneDNN has products of bf16.
    """

    __slots__ = ("_packed",)

    def __init__(self, matrix: Tensor) -> None:
        # No number of rows is given: one layout for all of them.
        rows_first = matrix.t().contiguous()
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(rows_first, None)

    def product(self, rows: Tensor) -> Tensor:
        """`[..., I]` times the matrix, `[..., O]`."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self._packed, None, "none", [], ""
        )
        return result

    def add_product(self, total: Tensor, rows: Tensor) -> Tensor:
        """The same, and `total` `[..., O]` added before the result is rounded."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            rows, total, self._packed, None, "add"
        )
        return result


Matrix = Tensor | PackedMatrix
Matrices = Tensor | tuple[PackedMatrix, ...]


def pack(matrix: Tensor) -> Matrix:
    """A matrix `[I, O]` for `product`; the tensor itself where it is best as it is."""
    return PackedMatrix(matrix) if _is_packed(matrix) else matrix


def pack_each(matrices: Tensor) -> Matrices:
    """The same for `[M, I, O]`."""
    return tuple(map(PackedMatrix, matrices)) if _is_packed(matrices) else matrices


def product(rows: Tensor, matrix: Matrix) -> Tensor:
    """`[..., I]` times a matrix, `[..., O]`."""
    return matrix.product(rows) if isinstance(matrix, PackedMatrix) else rows @ matrix


def add_product(total: Tensor, rows: Tensor, matrix: Matrix) -> Tensor:
    """`[N, O]` plus `[N, I]` times a matrix."""
    if isinstance(matrix, PackedMatrix):
        return matrix.add_product(total, rows)
    return torch.addmm(total, rows, matrix)


def products(rows: Tensor, matrices: Matrices) -> Tensor:
    """`[N, I]`, or `[M, N, I]` one by one, times M matrices: `[M, N, O]`."""
    if isinstance(matrices, Tensor):
        return rows @ matrices
    each = rows.expand(len(matrices), -1, -1)
    return torch.stack([m.product(part) for m, part in zip(matrices, each, strict=True)])


def add_products(total: Tensor, rows: Tensor, matrices: Matrices) -> Tensor:
    """`[M, N, O]` plus `[M, N, I]` times M matrices, one by one."""
    if isinstance(matrices, Tensor):
        return torch.baddbmm(total, rows, matrices)
    parts = zip(matrices, total, rows, strict=True)
    return torch.stack([matrix.add_product(sums, part) for matrix, sums, part in parts])


def _is_packed(matrices: Tensor) -> bool:
    """Whether the library has a layout of its own for them that pays."""
    return (
        matrices.dtype == torch.bfloat16
        and matrices.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
