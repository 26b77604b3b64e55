"""Ranks for tests: real processes over gloo, forked from one server that has the libraries loaded.

`spawn` would import torch, megatron-core and DeepSpeed in every rank of every test (about 4 s each
on one core); `fork` hangs once torch has started threads in the parent. A fork server is started
once and never runs torch itself.
"""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")
_PRELOAD = ["torch", "torch.distributed", "pytest", "tests.support.harness_preload"]


class RankFailedError(AssertionError):
    """A rank raised, died or did not finish; the message is the first failing rank's own."""


def prepared_context() -> ForkServerContext:
    """The fork server's context; the first call starts it, which takes some seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def run_ranks(
    world_size: int, function: Callable[..., Result], *args: Any, timeout_s: float = 120.0
) -> list[Result]:
    """Call `function(*args)` in `world_size` ranks of a fresh gloo world.

    Args:
        world_size: number of ranks, each a process of its own.
        function: a module-level function; it may use torch.distributed at once.
        args: picklable arguments, the same for all ranks.
        timeout_s: after this the ranks are killed and the test fails.

    Returns:
        What each rank returned, in rank order.

    Raises:
        RankFailedError: with the traceback of the first rank that failed.
    """
    context = prepared_context()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            context.Process(
                target=_rank_main,
                args=(rank, world_size, Path(folder) / "rendezvous", pipe[1], function, args),
                daemon=False,
            )
            for rank, pipe in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        for _, sender in pipes:
            sender.close()
        try:
            return _collect([receiver for receiver, _ in pipes], timeout_s)
        finally:
            for process in processes:
                process.join(5)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(receivers: list[Connection], timeout_s: float) -> list[Any]:
    deadline = time.monotonic() + timeout_s
    results: dict[int, Any] = {}
    waiting = {receiver: rank for rank, receiver in enumerate(receivers)}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailedError(f"ranks {sorted(waiting.values())} ran past {timeout_s} s")
        for receiver in ready:
            assert isinstance(receiver, Connection)
            rank = waiting.pop(receiver)
            try:
                succeeded, value = pickle.loads(receiver.recv_bytes())
            except (EOFError, ConnectionResetError):
                raise RankFailedError(f"rank {rank} died without a word") from None
            if not succeeded:
                raise RankFailedError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in sorted(results)]


def _rank_main(
    rank: int,
    world_size: int,
    rendezvous: Path,
    sender: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size
        )
        value = function(*args)
        sender.send_bytes(pickle.dumps((True, value)))  # plain bytes: tensors would go as handles
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        sender.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        sender.close()
        os._exit(0)  # skips destructors of half-torn process groups, which may hang
