"""What ranks agree on, so that none of them goes another way than the others.

Every function is a collective while a process group exists, and works without one.
"""

import signal
from collections.abc import Callable
from typing import NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")


def rank_and_world() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main() -> bool:
    """Whether this is rank 0, or the only process."""
    return rank_and_world()[0] == 0


class AgreedByAllRanks(Exception):
    """The cause of an error that every rank raises with the same message: one of them says it."""


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
        raise error(message) from AgreedByAllRanks()
    return cast(Value, value)


def on_all_ranks(evaluate: Callable[[], Value], *errors: type[Exception]) -> Value:
    """What each rank evaluates for itself, if all of them can.

    Args:
        evaluate: called on every rank.
        errors: what `evaluate` may raise; then every rank raises the first rank's error.
    """
    value, failure = None, None
    try:
        value = evaluate()
    except errors as error:
        failure = error
    for rank, found in enumerate(from_all(failure)):
        if found is not None:
            message = str(found) if rank == 0 else f"rank {rank}: {found}"
            raise type(found)(message) from AgreedByAllRanks()
    return cast(Value, value)


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


def judged_by_main(
    value: Value, judge: Callable[[list[Value]], None], error: type[Exception]
) -> None:
    """Let rank 0 judge what all ranks have.

    Args:
        value: of this rank.
        judge: called on rank 0 only, with every rank's value in rank order.
        error: what `judge` may raise; then every rank raises it, with the same message.
    """
    gathered: list[Value] = [value]
    if dist.is_initialized():
        gathered = [value] * dist.get_world_size()
        dist.gather_object(value, gathered if is_main() else None)
    from_main(lambda: judge(gathered), error)


class RankFlags(NamedTuple):
    """What one rank tells the others once per step.

    Attributes:
        signal: number of a signal that asks for the run to stop; 0 for none.
        save_done: whether this rank has done its part of a save that is in flight.
    """

    signal: int = 0
    save_done: bool = False


class Agreed(NamedTuple):
    """What all ranks know after a step's one exchange; the same on all of them.

    Attributes:
        finite: losses and gradients are finite on every rank.
        signal: name of a signal that a rank received, or None.
        save_done: every rank has done its part of the save in flight.
    """

    finite: bool
    signal: str | None
    save_done: bool


def agree(finite: Tensor, flags: RankFlags) -> Agreed:
    """The step's one exchange of flags: one reduction, and one wait of the host for it.

    Args:
        finite: bool on the device: whether this rank's losses and gradients are finite.
        flags: what else this rank tells.
    """
    told = torch.tensor([-flags.signal, int(flags.save_done)], device=finite.device)
    votes = torch.cat([finite.to(told.dtype).view(1), told])
    if dist.is_initialized():
        dist.all_reduce(votes, op=dist.ReduceOp.MIN)
    all_finite, negated, all_done = votes.tolist()
    name = signal.Signals(-negated).name if negated else None
    return Agreed(bool(all_finite), name, bool(all_done))
