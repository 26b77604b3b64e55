"""Speed and memory of the training steps, without validation and checkpoints."""

import resource
import time

import torch
import torch.distributed as dist

from pipeline.config.run_config import RunConfig
from pipeline.distributed.topology import Topology
from pipeline.guard.straggler import OwnTime, Stragglers
from pipeline.reporting.hardware import peak_flops
from pipeline.reporting.metrics import Record

_GIB = 2**30


class Throughput:
    """Times steps between two reports.

    Args:
        config: the run.
        topology: the grid of ranks.
        stragglers: compares their own times.
    """

    def __init__(self, config: RunConfig, topology: Topology, stragglers: Stragglers) -> None:
        self._stragglers = stragglers
        self._world_size = topology.info.world_size
        self._own = OwnTime()
        self._tokens_per_step = config.tokens_per_step(topology.data_size)
        self._flops_per_token = config.flops_per_token
        self._device = topology.device
        self._peak: float | None = None
        if self._device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(self._device))
            self._peak = peak * topology.info.world_size if peak else None
        self._steps = 0
        self._busy_s = 0.0
        self._started_s = 0.0

    def start(self) -> None:
        """A step begins."""
        self._started_s = time.perf_counter()
        self._own.start()

    def stop(self) -> None:
        """The step has ended."""
        self._own.stop()
        self._busy_s += time.perf_counter() - self._started_s
        self._steps += 1

    def figures(self, own_s: float | None = None) -> Record:
        """Means since the last call; a collective, since ranks are compared.

        Args:
            own_s: own time of this rank since the last call, by its device; None = by the host.
        """
        step_time_s = self._busy_s / max(self._steps, 1)
        by_host_s = self._own.take()
        own = self._of_all_ranks([self._memory_peak_gib(), by_host_s if own_s is None else own_s])
        found = self._stragglers.report([seconds for _, seconds in own], self._steps)
        self._steps, self._busy_s = 0, 0.0
        tokens_per_s = self._tokens_per_step / max(step_time_s, 1e-9)
        record: Record = {
            "tokens_per_s": tokens_per_s,
            "step_time_s": step_time_s,
            "memory_peak_gib": max(peak for peak, _ in own),
        }
        if found is not None:
            record |= {
                "slowest_rank": found.rank,
                "slowest_rank_time_s": found.own_s,
                "median_rank_time_s": found.median_s,
            }
        if self._peak:
            record["mfu"] = tokens_per_s * self._flops_per_token / self._peak
        return record

    def _memory_peak_gib(self) -> float:
        """Most memory this rank has held: allocated on a GPU, resident on a CPU."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / _GIB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB

    def _of_all_ranks(self, values: list[float]) -> list[list[float]]:
        """These values of every rank, in their order."""
        mine = torch.tensor(values, dtype=torch.float64, device=self._device)
        gathered = [torch.empty_like(mine) for _ in range(self._world_size)]
        dist.all_gather(gathered, mine)
        of_all: list[list[float]] = torch.stack(gathered).tolist()  # one wait for the device
        return of_all
