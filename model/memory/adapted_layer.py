"""Adds low-rank adapters to the products of a layer, also where tensor-parallel ranks share them.

Legend: r rank of the adapters.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor, nn

from model.memory.adapters import COLUMN_PRODUCTS, ROW_PRODUCTS
from model.memory.sizes import MemorySizes


class Adapter(nn.Module):
    """alpha / r * B (A x), beside one product.

    Of a product whose weight is split by rows, each rank holds all of A and its rows of B; of one
    that is split by columns, its columns of A and all of B.

    Args:
        sizes: with r and alpha.
        shape: of the product's weight on this rank.
        dtype: of the weights.
        split_by_columns: how tensor-parallel ranks share the product.
    """

    def __init__(
        self,
        sizes: MemorySizes,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        split_by_columns: bool,
    ) -> None:
        super().__init__()
        rows, columns = shape
        self.down = nn.Parameter(torch.empty(sizes.adapter_rank, columns, dtype=dtype))
        self.up = nn.Parameter(torch.empty(rows, sizes.adapter_rank, dtype=dtype))
        self._scale = sizes.adapter_alpha / sizes.adapter_rank
        self._split_by_columns = split_by_columns

    def forward(self, hidden: Tensor) -> Tensor:
        """What it adds `[..., out]` for the product's input `[..., in]`, this rank's parts."""
        small: Tensor = F.linear(hidden, self.down)
        if self._split_by_columns:
            small = reduce_from_tensor_model_parallel_region(small)
        else:  # whose gradient each rank has a part of
            small = copy_to_tensor_model_parallel_region(small)
        return self._scale * F.linear(small, self.up)


def add_adapters(
    block: nn.Module,
    sizes: MemorySizes,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
) -> None:
    """Give each product of a layer an adapter.

    Args:
        block: megatron's layer.
        sizes: of the memory.
        shapes: of the layer's weights on this rank, by their names in it.
        dtype: of the weights.
    """
    for product in COLUMN_PRODUCTS + ROW_PRODUCTS:
        module = block.get_submodule(product)
        module.adapter = Adapter(
            sizes, shapes[f"{product}.weight"], dtype, split_by_columns=product in ROW_PRODUCTS
        )
        # A hook, since the product is megatron's module or Transformer Engine's.
        module.register_forward_hook(_with_adapter)


def _with_adapter(
    module: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, Any]
) -> tuple[Tensor, Any]:
    product, bias = output
    return product + module.get_submodule("adapter")(inputs[0]), bias
