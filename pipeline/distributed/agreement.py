"""What ranks agree on, so that none of them goes another way than the others.

Every function is a collective while a process group exists, and works without one.
"""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

Value = TypeVar("Value")


def place() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main() -> bool:
    """Whether this is rank 0, or the only process."""
    return place()[0] == 0


def from_main(evaluate: Callable[[], Value], error: type[Exception]) -> Value:
    """What rank 0 evaluates, on all ranks: one view for all, whatever a node's cache shows.

    Args:
        evaluate: called on rank 0 only.
        error: what `evaluate` may raise; then every rank raises it, with the same message.
    """
    box: list[tuple[Value | None, str | None]] = [(None, None)]
    if is_main():
        try:
            box = [(evaluate(), None)]
        except error as problem:
            box = [(None, str(problem))]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    value, message = box[0]
    if message is not None:
        raise error(message)
    return value  # type: ignore[return-value]


def from_all(value: Value) -> list[Value]:
    """Every rank's value, in rank order, on all ranks."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Value] = [value] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def first_problem(problem: str | None) -> str | None:
    """The first rank's problem, with its rank, on all ranks; None when none has one."""
    for rank, found in enumerate(from_all(problem)):
        if found is not None:
            return found if rank == 0 else f"rank {rank}: {found}"
    return None
