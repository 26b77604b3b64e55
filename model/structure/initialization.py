"""Initial weights that depend on (seed, parameter name, global position) and on nothing else.

One process or any tensor-, data-parallel or ZeRO layout starts from the same model: a layout is a
way of storing the weights and may not change them.
"""

import hashlib
import math

import torch
from torch import Tensor

from model.memory.adapters import UP
from model.structure.sharding import Placement, global_shape, placement_of, take_slice

_ROWS_PER_BLOCK = 256  # each block of rows has a generator of its own


def initial_weight(
    name: str,
    local_shape: torch.Size,
    *,
    seed: int,
    std: float,
    num_layers: int,
    tensor_rank: int = 0,
    tensor_size: int = 1,
) -> Tensor:
    """One rank's part of a parameter's initial value.

    Norm weights are 1. Matrices are normal with `std`; those that write into the residual stream
    (attention projection, second MLP matrix) with `std / sqrt(2 * num_layers)` (GPT-2). Low-rank
    adapters add nothing.

    Args:
        name: full parameter name, the same in every layout.
        local_shape: shape of this rank's part.
        seed: the run's seed.
        std: standard deviation of matrices.
        num_layers: L, trunk and head layers together.
        tensor_rank: this rank's position among `tensor_size` tensor-parallel ranks.
        tensor_size: tensor-parallel size.

    Returns:
        float32 tensor of `local_shape` on the CPU.
    """
    if len(local_shape) == 1:
        return torch.ones(local_shape)
    if name.endswith(f".{UP}"):
        return torch.zeros(local_shape)
    placement = placement_of(name)
    shape = global_shape(local_shape, placement, tensor_size)
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std /= math.sqrt(2 * num_layers)
    if placement.dim == 1:
        rows = _normal_rows(name, 0, shape[0], shape[1], seed)
        part = take_slice(rows, placement, tensor_rank, tensor_size)
    else:
        spans = _row_spans(shape[0], placement, tensor_rank, tensor_size)
        part = torch.cat([_normal_rows(name, a, b, shape[1], seed) for a, b in spans])
    return part.mul(std).contiguous()


def _row_spans(rows: int, placement: Placement, rank: int, size: int) -> list[tuple[int, int]]:
    """Global row intervals that one rank holds."""
    if placement.dim is None:
        return [(0, rows)]
    block = rows // placement.blocks
    part = block // size
    starts = [index * block + rank * part for index in range(placement.blocks)]
    return [(start, start + part) for start in starts]


def _normal_rows(name: str, start: int, stop: int, columns: int, seed: int) -> Tensor:
    """Rows start .. stop of the whole standard-normal matrix that belongs to (seed, name)."""
    first, last = start // _ROWS_PER_BLOCK, (stop - 1) // _ROWS_PER_BLOCK
    blocks = [_normal_block(name, index, columns, seed) for index in range(first, last + 1)]
    offset = first * _ROWS_PER_BLOCK
    return torch.cat(blocks)[start - offset : stop - offset]


def _normal_block(name: str, index: int, columns: int, seed: int) -> Tensor:
    digest = hashlib.blake2b(f"{seed}/{name}/{index}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(_ROWS_PER_BLOCK, columns, generator=generator)
