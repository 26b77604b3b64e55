"""Speed and memory of the training steps, without validation and checkpoints."""

import resource
import time

import torch
import torch.distributed as dist

from pipeline.config.run_config import RunConfig
from pipeline.distributed.topology import Topology
from pipeline.reporting.hardware import peak_flops
from pipeline.reporting.metrics import Record

_GIB = 2**30


class Throughput:
    """Times steps between two reports.

    Args:
        config: the run.
        topology: the grid of ranks.
    """

    def __init__(self, config: RunConfig, topology: Topology) -> None:
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

    def stop(self) -> None:
        """The step has ended."""
        self._busy_s += time.perf_counter() - self._started_s
        self._steps += 1

    def figures(self) -> Record:
        """Means since the last call; a collective, since memory is the largest of all ranks."""
        step_time_s = self._busy_s / max(self._steps, 1)
        self._steps, self._busy_s = 0, 0.0
        tokens_per_s = self._tokens_per_step / max(step_time_s, 1e-9)
        record: Record = {
            "tokens_per_s": tokens_per_s,
            "step_time_s": step_time_s,
            "memory_peak_gib": self._memory_peak_gib(),
        }
        if self._peak:
            record["mfu"] = tokens_per_s * self._flops_per_token / self._peak
        return record

    def _memory_peak_gib(self) -> float:
        """Most memory any rank has held: allocated on a GPU, resident on a CPU."""
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device) / _GIB
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB
        largest = torch.tensor(peak, dtype=torch.float64, device=self._device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return float(largest)
