"""A copy of a rank's snapshot in the host's memory, made while training waits.

The memory is kept from one save to the next: pages that the system has to find first make the
copy several times slower, and memory that is taken once is known to suffice.
"""

import torch
from torch import Tensor

from pipeline.checkpoint.sharded_tensors import Snapshot


class HostCopy:
    """Memory of the size of this rank's snapshot, from its first use on."""

    def __init__(self) -> None:
        self._runs: dict[str, Tensor] = {}

    def take(self, snapshot: Snapshot) -> Snapshot:
        """Copy a snapshot; the copy holds until the next call.

        Raises:
            RuntimeError: there is not enough memory.
        """
        for key, run in snapshot.runs.items():
            kept = self._runs.get(key)
            if kept is None or kept.shape != run.shape or kept.dtype != run.dtype:
                self._runs[key] = torch.empty(
                    run.shape, dtype=run.dtype, device="cpu", pin_memory=run.is_cuda
                )
        runs = {key: self._runs[key] for key in snapshot.runs}
        self._runs = runs
        for key, run in snapshot.runs.items():
            runs[key].copy_(run.detach(), non_blocking=True)
        if any(run.is_cuda for run in snapshot.runs.values()):
            torch.cuda.synchronize()
        return snapshot._replace(runs=runs)
