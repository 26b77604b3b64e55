"""Whether runs of elements, over all ranks, are a model's weights and moments exactly once.

A rank saves what it finds in DeepSpeed's optimizers. If one found nothing, or two found the same,
every file could be whole and the checkpoint still not be the model; so this is checked at start,
from what the ranks would save, and before a checkpoint is committed, from what the files hold.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from model.config import ModelConfig
from model.structure.parameter_shapes import parameter_shapes
from model.structure.sharding import placement_of

KINDS = ("weight", "exp_avg", "exp_avg_sq")


class Extent(NamedTuple):
    """A run of elements of a flattened tensor-parallel slice.

    Attributes:
        kind: one of `KINDS`.
        name: of the parameter.
        tensor_rank: whose slice it is of; 0 for parameters that are not split.
        start: first element.
        stop: end of the elements.
    """

    kind: str
    name: str
    tensor_rank: int
    start: int
    stop: int


def coverage_problems(
    extents: Iterable[Extent],
    config: ModelConfig,
    *,
    tensor_size: int,
    trained: Callable[[str], bool],
) -> list[str]:
    """What is missing, held twice, or not the model's, a line each; empty when all is there once.

    Args:
        extents: what all ranks hold.
        config: sizes of the model.
        tensor_size: tensor-parallel size.
        trained: whether the optimizer has the parameter of a name, so that it has moments.

    Example: of a weight of 100 elements on two ranks, [0, 40) and [50, 100) give
    "weight of NAME (tensor-parallel rank 0) is missing elements 40 to 49".
    """
    found: dict[tuple[str, str, int], list[tuple[int, int]]] = defaultdict(list)
    for extent in extents:
        key = (extent.kind, extent.name, extent.tensor_rank)
        found[key].append((extent.start, extent.stop))
    problems = []
    for name, shape in parameter_shapes(config).items():
        ranks = 1 if placement_of(name).dim is None else tensor_size
        for rank in range(ranks):
            for kind in KINDS if trained(name) else KINDS[:1]:
                runs = sorted(found.pop((kind, name, rank), []))
                for fault in _faults(runs, math.prod(shape) // ranks):
                    problems.append(f"{kind} of {name} (tensor-parallel rank {rank}) {fault}")
    problems += [
        f"{kind} of {name} (tensor-parallel rank {rank}) is not the model's"
        for kind, name, rank in found
    ]
    return problems


def _faults(runs: list[tuple[int, int]], count: int) -> Iterator[str]:
    """Where sorted runs differ from [0, count)."""
    done = 0
    for start, stop in runs:
        if start > done:
            yield f"is missing elements {done:,} to {start - 1:,}"
        elif start < done:
            yield f"is held twice from element {start:,} on"
        done = max(done, stop)
    if done < count:
        yield f"is missing elements {done:,} to {count - 1:,}"
    elif done > count:
        yield f"has {done:,} elements instead of {count:,}"
