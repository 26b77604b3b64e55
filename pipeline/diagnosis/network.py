"""Checks of the network: an all-reduce and a ring over all ranks, their results and their speed."""

import socket
import statistics
import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.diagnosis.check import Check, Context, Outcome, ranks_text

_GPU_ELEMENTS, _CPU_ELEMENTS = 1 << 26, 1 << 20  # of fp32: 256 MiB, 4 MiB
_REPEATS = 5
# A link so much slower than the median one holds all of them up.
_SLOW_LINK = 4


class _Measured(NamedTuple):
    """What a rank saw.

    Attributes:
        right: whether what came was what had to come.
        seconds: of one exchange, the median.
        host: this rank's.
    """

    right: bool
    seconds: float
    host: str


def _elements(context: Context) -> int:
    return _GPU_ELEMENTS if context.device.type == "cuda" else _CPU_ELEMENTS


def _seconds(context: Context, action: Any) -> float:
    """Median time of an action that all ranks do at once."""
    times = []
    for _ in range(_REPEATS + 1):
        dist.barrier()
        _synchronize(context)
        started = time.perf_counter()
        action()
        _synchronize(context)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def _synchronize(context: Context) -> None:
    if context.device.type == "cuda":
        torch.cuda.synchronize(context.device)


def _all_reduce(context: Context) -> _Measured:
    rank, world = context.info.rank, context.info.world_size
    # Whole numbers that fp32 adds up exactly, different ones in every place and on every rank.
    numbers = torch.arange(_elements(context), device=context.device) % 1009
    mine = (numbers + rank).float()
    reduced = mine.clone()
    dist.all_reduce(reduced)
    expected = (numbers * world + world * (world - 1) // 2).float()
    right = bool(torch.equal(reduced, expected))
    return _Measured(right, _seconds(context, lambda: dist.all_reduce(mine)), socket.gethostname())


def _judge_all_reduce(context: Context, ranks: list[_Measured]) -> Outcome:
    wrong = [rank for rank, measured in enumerate(ranks) if not measured.right]
    problems = []
    if wrong:
        problems.append(
            f"an all-reduce gave wrong sums on {ranks_text(wrong)} ({ranks[wrong[0]].host}); do "
            "not train there: take these nodes out and test their memory, links and NCCL's version"
        )
    world, slowest = len(ranks), max(measured.seconds for measured in ranks)
    if world == 1:
        return Outcome("1 rank, nothing to send", problems)
    size = 4 * _elements(context)
    bus = 2 * (world - 1) / world * size / slowest / 1e9
    return Outcome(
        f"{'wrong' if wrong else 'right'}, {size >> 20} MiB over {world} ranks in "
        f"{slowest * 1000:.1f} ms, {bus:.2f} GB/s a rank",
        problems,
    )


def _ring(context: Context) -> _Measured:
    """Send to the next rank what only this one has, and take the same from the one before."""
    rank, world = context.info.rank, context.info.world_size
    if world == 1:
        return _Measured(True, 0.0, socket.gethostname())
    mine = (torch.arange(_elements(context), device=context.device) % 1013 + rank).float()
    came = torch.empty_like(mine)

    def exchange() -> None:
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, mine, (rank + 1) % world),
                dist.P2POp(dist.irecv, came, (rank - 1) % world),
            ]
        )
        for work in works:
            work.wait()

    seconds = _seconds(context, exchange)
    return _Measured(_is_from(came, mine, rank, world), seconds, socket.gethostname())


def _is_from(came: Tensor, mine: Tensor, rank: int, world: int) -> bool:
    """Whether what came is what the rank before has to send."""
    return bool(torch.equal(came, mine - rank + (rank - 1) % world))


def _judge_ring(context: Context, ranks: list[_Measured]) -> Outcome:
    world = len(ranks)
    if world == 1:
        return Outcome("1 rank, nothing to send")
    problems = []
    for rank, measured in enumerate(ranks):
        if not measured.right:
            before = (rank - 1) % world
            problems.append(
                f"rank {rank} on {measured.host} did not get what rank {before} on "
                f"{ranks[before].host} sent; take these nodes out and test their links"
            )
    seconds = [measured.seconds for measured in ranks]
    slowest, middle = max(range(world), key=seconds.__getitem__), statistics.median(seconds)
    size = 4 * _elements(context)
    if context.device.type == "cuda" and seconds[slowest] > _SLOW_LINK * middle:
        before = (slowest - 1) % world
        problems.append(
            f"the link from rank {before} on {ranks[before].host} to rank {slowest} on "
            f"{ranks[slowest].host} is {seconds[slowest] / middle:.1f} times slower than the "
            "median one; every step waits for it: exclude one of the two and ask again"
        )
    return Outcome(
        f"{'wrong' if any(not m.right for m in ranks) else 'right'}, {size >> 20} MiB to the next "
        f"rank at {size / middle / 1e9:.2f} GB/s, the slowest at "
        f"{size / seconds[slowest] / 1e9:.2f} (into rank {slowest})",
        problems,
    )


CHECKS = (
    Check("all-reduce", _all_reduce, _judge_all_reduce),
    Check("ring", _ring, _judge_ring),
)
