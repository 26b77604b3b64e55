"""A copy of a rank's snapshot in the host's memory, made while training waits.

The memory is kept from one save to the next: pages that the system has to find first make the
copy several times slower, and memory that is taken once is known to suffice.
"""

import contextlib
import logging
import weakref

import torch
from torch import Tensor

from pipeline.checkpoint.sharded_tensors import Snapshot

logger = logging.getLogger(__name__)

_ALIGNMENT = 64


class HostCopy:
    """Memory of the size of this rank's snapshot, from its first use on."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._unlock: weakref.finalize[..., HostCopy] | None = None

    def take(self, snapshot: Snapshot) -> Snapshot:
        """Copy a snapshot; the copy holds until the next call.

        Raises:
            RuntimeError: there is not enough memory.
        """
        on_gpu = any(run.is_cuda for run in snapshot.runs.values())
        runs = self._views(snapshot.runs, pinned=on_gpu)
        for key, run in snapshot.runs.items():
            runs[key].copy_(run.detach(), non_blocking=True)
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return snapshot._replace(runs=runs)

    def _views(self, runs: dict[str, Tensor], *, pinned: bool) -> dict[str, Tensor]:
        """Room for every run, one behind the other in one buffer."""
        places, end = {}, 0
        for key, run in runs.items():
            places[key] = slice(end, end + run.nbytes)
            end += -(-run.nbytes // _ALIGNMENT) * _ALIGNMENT
        if self._buffer.numel() < end:
            if self._unlock is not None:
                self._unlock()
            self._buffer = torch.empty(end, dtype=torch.uint8)
            self._unlock = self._locked() if pinned else None
        return {
            key: self._buffer[places[key]].view(run.dtype).view(run.shape)
            for key, run in runs.items()
        }

    def _locked(self) -> "weakref.finalize[..., HostCopy] | None":
        """Lock the buffer's pages, for the GPU to write into; what unlocks them again.

        Not by torch's pinned tensors, which take a power of two: up to twice the memory.
        """
        cudart, address, size = torch.cuda.cudart(), self._buffer.data_ptr(), self._buffer.numel()
        if not int(cudart.cudaHostRegister(address, size, 0)):
            # At the latest with this object, before its memory is given back: to CUDA the address
            # would stay these pages, and copies to memory that comes to lie there would miss it.
            unlock = weakref.finalize(self, cudart.cudaHostUnregister, address)
            unlock.atexit = False
            return unlock
        logger.warning(
            "%.1f GB of host memory could not be locked for copies from the GPU (ulimit -l); saves "
            "hold training up longer",
            size / 1e9,
        )
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device="cuda")  # CUDA tells the failure to the next launch: to this one
        return None
