"""How each parameter is split over tensor-parallel ranks: the one table, and its arithmetic.

Megatron's column-parallel weights are split by rows (dimension 0), row-parallel ones by columns.
The gated MLP's first weight holds gate and up one below the other, and each rank holds its part
of both, so it is split block by block.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Placement(NamedTuple):
    """Where a parameter lives.

    Attributes:
        dim: dimension split over tensor-parallel ranks; None = a full copy on every rank.
        blocks: equal blocks along `dim` that are each split (2 for gate and up).
    """

    dim: int | None
    blocks: int = 1


REPLICATED = Placement(None)
PLACEMENTS = {
    "embedding.weight": Placement(0),
    "self_attention.linear_qkv.weight": Placement(0),  # groups of [queries, key, value] stay whole
    "self_attention.linear_proj.weight": Placement(1),
    "mlp.linear_fc1.weight": Placement(0, blocks=2),
    "mlp.linear_fc2.weight": Placement(1),
    "input_layernorm.weight": REPLICATED,
    "pre_mlp_layernorm.weight": REPLICATED,
    "readout.norm_weight": REPLICATED,
    "readout.weight": Placement(0),
    "unembedding.weight": Placement(0),
    "projection.weight": Placement(1),
    "self_attention.linear_qkv.adapter.down": REPLICATED,
    "self_attention.linear_qkv.adapter.up": Placement(0),
    "self_attention.linear_proj.adapter.down": Placement(1),
    "self_attention.linear_proj.adapter.up": REPLICATED,
    "mlp.linear_fc1.adapter.down": REPLICATED,
    "mlp.linear_fc1.adapter.up": Placement(0, blocks=2),
    "mlp.linear_fc2.adapter.down": Placement(1),
    "mlp.linear_fc2.adapter.up": REPLICATED,
    "memory.initial": REPLICATED,
    "memory.summary": REPLICATED,
    "memory.query": REPLICATED,
    "memory.key": REPLICATED,
}


def placement_of(name: str) -> Placement:
    """The placement of the parameter with this full name.

    Raises:
        KeyError: no rule covers the name; a new kind of parameter needs a line in the table.
    """
    for suffix, placement in PLACEMENTS.items():
        if name == suffix or name.endswith("." + suffix):
            return placement
    raise KeyError(
        f"no placement rule for parameter {name!r}; add one to model/structure/sharding.py"
    )


def global_shape(local_shape: torch.Size, placement: Placement, size: int) -> torch.Size:
    """Shape of the whole parameter, given one rank's shape and the tensor-parallel size."""
    shape = list(local_shape)
    if placement.dim is not None:
        shape[placement.dim] *= size
    return torch.Size(shape)


def local_shape(shape: tuple[int, ...], placement: Placement, size: int) -> tuple[int, ...]:
    """One rank's shape of a parameter, from the whole one and the tensor-parallel size."""
    return tuple(
        length // size if dim == placement.dim else length for dim, length in enumerate(shape)
    )


def local_shapes(shapes: Mapping[str, tuple[int, ...]], size: int) -> dict[str, tuple[int, ...]]:
    """The same of parameters by their names."""
    return {name: local_shape(shape, placement_of(name), size) for name, shape in shapes.items()}


def take_slice(whole: Tensor, placement: Placement, rank: int, size: int) -> Tensor:
    """Rank `rank`'s part of a whole parameter.

    Example: gate|up of 4+4 rows over 2 ranks: rank 0 gets rows 0,1 and 4,5.
    """
    if placement.dim is None or size == 1:
        return whole
    blocks = whole.chunk(placement.blocks, dim=placement.dim)
    parts = [block.chunk(size, dim=placement.dim)[rank] for block in blocks]
    return torch.cat(parts, dim=placement.dim) if len(parts) > 1 else parts[0]


def merge_slices(slices: list[Tensor], placement: Placement) -> Tensor:
    """The whole parameter from all ranks' parts, in rank order; inverse of `take_slice`."""
    if placement.dim is None or len(slices) == 1:
        return slices[0]
    parts = [part.chunk(placement.blocks, dim=placement.dim) for part in slices]
    blocks = [torch.cat(block, dim=placement.dim) for block in zip(*parts, strict=True)]
    return torch.cat(blocks, dim=placement.dim)


def whole_rows(
    rows: range, shape: tuple[int, ...], placement: Placement, rank: int, size: int
) -> Iterator[range]:
    """Which rows of the whole matrix a slice's rows are, as runs that rise with them.

    Example: gate and up of 4 rows each (8 in all) over 2 ranks: rank 1 holds rows 2, 3, 6, 7, so
    its rows 1 to 2 are 3:4 and 6:7.
    """
    block = shape[0] // placement.blocks
    local = block // size
    row = rows.start
    while row < rows.stop:
        number, offset = divmod(row, local)
        length = min(local - offset, rows.stop - row)
        first = number * block + rank * local + offset
        yield range(first, first + length)
        row += length


def stored_rows(
    rows: range, shape: tuple[int, ...], placement: Placement, size: int
) -> Iterator[tuple[int, range]]:
    """Where rows of the whole matrix lie: the tensor-parallel rank, and rows of its slice."""
    block = shape[0] // placement.blocks
    local = block // size
    row = rows.start
    while row < rows.stop:
        number, offset = divmod(row, block)
        rank, inside = divmod(offset, local)
        length = min(local - inside, rows.stop - row)
        first = number * local + inside
        yield rank, range(first, first + length)
        row += length


def mark_split_parameters(module: nn.Module) -> None:
    """Tell DeepSpeed which parameters are split, so that norms count copies once."""
    for name, parameter in module.named_parameters():
        dim = placement_of(name).dim
        parameter.tensor_model_parallel = dim is not None  # type: ignore[attr-defined]
        parameter.partition_dim = -1 if dim is None else dim  # type: ignore[attr-defined]
