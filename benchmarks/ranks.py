"""Ranks for benchmarks: fresh processes over gloo on this machine, one torch thread each."""

import logging
import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")


def run_ranks(
    world_size: int, preload: str, function: Callable[..., Result], *arguments: Any
) -> list[Result]:
    """Call `function(*arguments)` in so many ranks of a new gloo world.

    Args:
        world_size: number of ranks; the peak memory of each is of this call alone.
        preload: module that a fork server imports once for all ranks.
        function: a module-level function that may use torch.distributed at once.
        arguments: picklable, the same for all ranks.

    Returns:
        What each rank returned, in rank order.

    Raises:
        SystemExit: a rank ended without a result; its own message stands above.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"  # read when the fork server imports DeepSpeed
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        processes = []
        for rank, (_, sender) in enumerate(pipes):
            position = (rank, world_size, Path(folder) / "rendezvous")
            process = context.Process(target=_child, args=(sender, position, function, arguments))
            process.start()
            sender.close()
            processes.append(process)
        try:
            for rank, (receiver, _) in enumerate(pipes):
                try:
                    results.append(receiver.recv())
                except EOFError:
                    raise SystemExit(f"rank {rank} ended without a result") from None
        finally:
            for process in processes:
                if len(results) < world_size:
                    process.kill()
                process.join()
    return results


def _child(
    sender: Connection,
    position: tuple[int, int, Path],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    # Imported here: the fork server has it loaded, and the parent needs none of it.
    import torch
    import torch.distributed as dist

    rank, world_size, rendezvous = position
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size
    )
    sender.send(function(*arguments))
    dist.barrier()
    os._exit(0)  # destructors of process groups may wait for ranks that are gone
