"""Bytes that autograd keeps for backward, now and at most; the same on CPU and GPU."""

import weakref
from collections import Counter
from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor


class _Saved:
    """What autograd holds in a tensor's place; its end is the end of the tensor's need."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class SavedTensorMeter:
    """Counts the memory held for backward by graphs built inside the context.

    Each storage counts once, however many operations keep a view of it. Memory that lives on
    anyway, such as the parameters', can be left out.

    Example: `with SavedTensorMeter() as meter: (x.exp() * y).sum().backward()` keeps `exp(x)` once
    and `y`, so `meter.peak` is the bytes of both and `meter.alive` is 0 afterwards.

    Args:
        excluded: tensors whose storage is not counted.
    """

    def __init__(self, excluded: Iterable[Tensor] = ()) -> None:
        self.alive = 0
        self.peak = 0
        self._excluded = {tensor.untyped_storage().data_ptr() for tensor in excluded}
        self._users: Counter[int] = Counter()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def __enter__(self) -> "SavedTensorMeter":
        self._hooks.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    def _pack(self, tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key not in self._excluded:
            if not self._users[key]:
                self.alive += size
                self.peak = max(self.peak, self.alive)
            self._users[key] += 1
            weakref.finalize(saved, self._release, key, size)
        return saved

    def _release(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            self.alive -= size


def _unpack(saved: _Saved) -> Tensor:
    return saved.tensor
