"""Initial weights that depend on (seed, parameter name, global position) and on nothing else.

One process or any tensor-, data-parallel or ZeRO layout starts from the same model: a layout is a
way of storing the weights and may not change them.
"""

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor

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
    rows, columns = global_shape(local_shape, placement, tensor_size)
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std /= math.sqrt(2 * num_layers)
    spans = [(0, rows)]
    if placement.dim != 1:
        spans = _row_spans(rows, placement, tensor_rank, tensor_size)
    values = torch.empty(sum(stop - start for start, stop in spans), columns)
    _fill_normal(values, spans, name, seed)
    if placement.dim == 1:
        values = take_slice(values, placement, tensor_rank, tensor_size).contiguous()
    return values.mul_(std)


def _row_spans(rows: int, placement: Placement, rank: int, size: int) -> list[tuple[int, int]]:
    """Global row intervals that one rank holds."""
    if placement.dim is None:
        return [(0, rows)]
    block = rows // placement.blocks
    part = block // size
    starts = [index * block + rank * part for index in range(placement.blocks)]
    return [(start, start + part) for start in starts]


def _fill_normal(out: Tensor, spans: list[tuple[int, int]], name: str, seed: int) -> None:
    """Spans of rows of the whole standard-normal matrix that belongs to (seed, name).

    Blocks are independent and torch makes each without the interpreter's lock, so that as many
    threads as torch may use share the work.
    """
    parts = []
    for start, stop in spans:
        for block in range(start // _ROWS_PER_BLOCK, (stop - 1) // _ROWS_PER_BLOCK + 1):
            first = block * _ROWS_PER_BLOCK
            wanted = slice(max(start - first, 0), min(stop - first, _ROWS_PER_BLOCK))
            parts.append((block, wanted))
    sizes = [wanted.stop - wanted.start for _, wanted in parts]

    def fill(part: tuple[int, slice], rows: Tensor) -> None:
        block, wanted = part
        digest = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        whole = rows if len(rows) == _ROWS_PER_BLOCK else rows.new_empty(_ROWS_PER_BLOCK, columns)
        torch.randn(whole.shape, generator=generator, out=whole)
        if whole is not rows:
            rows.copy_(whole[wanted])

    columns = out.shape[1]
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(fill, parts, out.split(sizes)))
