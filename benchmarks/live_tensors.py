"""Bytes of the tensors that are alive, now and at most: what an allocator would count, anywhere."""

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensorMeter(TorchDispatchMode):
    """Counts the memory of every tensor that an operation inside the context takes or gives.

    Each storage counts once, from its first use to the end of its last tensor, so that the peak is
    the most that tensors hold at once: weights, gradients, what autograd keeps, buffers. What a
    kernel needs for itself while it runs is not seen.

    Example: `with LiveTensorMeter() as meter: x = torch.ones(4); y = x * 2; del x` leaves
    `meter.alive` at the 16 bytes of `y`, and `meter.peak` at 32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = 0
        self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one operation and look at its tensors."""
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, Tensor):
                self._count(value)
        return result

    def restart_peak(self) -> None:
        """Look for the most from here on."""
        self.peak = self.alive

    def _count(self, tensor: Tensor) -> None:
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or not size:
            return
        self._seen.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.alive -= size
