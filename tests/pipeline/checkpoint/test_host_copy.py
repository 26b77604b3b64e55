"""Copies of snapshots in the host's memory, which on a GPU is locked for them."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pipeline.checkpoint.host_copy import HostCopy
from pipeline.checkpoint.sharded_tensors import Snapshot, run_key


def test_a_snapshot_on_the_host_does_not_change() -> None:
    """What is trained after the copy was made is not in it; the next copy uses its memory."""
    live = torch.zeros(3)
    key = run_key("weight", "x", 0)
    snapshot, memory = Snapshot(0, 0, 1, 0, {key: live}), HostCopy()
    copy = memory.take(snapshot)
    live += 1
    assert copy.runs[key].tolist() == [0, 0, 0]
    second = memory.take(snapshot)
    assert second.runs[key].tolist() == [1, 1, 1]
    assert second.runs[key].data_ptr() == copy.runs[key].data_ptr()
    larger = memory.take(snapshot._replace(runs={key: torch.ones(5)}))
    assert larger.runs[key].tolist() == [1] * 5


def test_a_copy_on_the_host_is_one_buffer() -> None:
    """Runs of any type and length lie in it one behind the other, and none overlaps another."""
    runs = {
        run_key("weight", "a", 0): torch.arange(7, dtype=torch.float32),
        run_key("weight", "b", 0): torch.arange(5, dtype=torch.bfloat16),
        run_key("exp_avg", "a", 3): torch.arange(3, dtype=torch.float64),
    }
    copy = HostCopy().take(Snapshot(0, 0, 1, 0, runs))
    assert all(torch.equal(copy.runs[key], run) for key, run in runs.items())
    assert all(copy.runs[key].dtype == run.dtype for key, run in runs.items())
    assert len({run.untyped_storage().data_ptr() for run in copy.runs.values()}) == 1


class _Cudart:
    """What CUDA knows of locked memory."""

    def __init__(self, *, refuses: bool = False) -> None:
        self.locked: dict[int, int] = {}
        self._refuses = refuses

    def cudaHostRegister(self, address: int, size: int, _flags: int) -> int:
        assert address not in self.locked, "cudaErrorHostMemoryAlreadyRegistered"
        if not self._refuses:
            self.locked[address] = size
        return int(self._refuses)

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


@pytest.fixture
def as_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[_Cudart], None]:
    """Lets every tensor look like one of a GPU, for copies to the host."""

    def patch(cudart: _Cudart) -> None:
        monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
        monkeypatch.setattr(
            torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None)
        )
        monkeypatch.setattr(Tensor, "is_cuda", True)

    return patch


def test_locked_memory_is_unlocked_before_it_is_given_back(
    as_of_a_gpu: Callable[[_Cudart], None],
) -> None:
    """When the copy grows and when it is gone, as after a rollback, CUDA knows of no page of it."""
    cudart = _Cudart()
    as_of_a_gpu(cudart)
    memory = HostCopy()
    for count in (3, 50, 20):
        key, run = run_key("weight", "x", 0), torch.arange(float(count))
        copy = memory.take(Snapshot(0, 0, 1, 0, {key: run}))
        assert copy.runs[key].tolist() == run.tolist()
        (address,) = cudart.locked
        assert address == copy.runs[key].untyped_storage().data_ptr()
    del memory
    assert not cudart.locked


def test_a_copy_is_made_where_memory_cannot_be_locked(
    as_of_a_gpu: Callable[[_Cudart], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """CUDA keeps the failure for the next launch of a kernel, which is none of the training's."""
    as_of_a_gpu(_Cudart(refuses=True))
    launches = []

    def launch(*_: object, device: str) -> None:
        launches.append(device)
        raise RuntimeError("CUDA error: OS call failed")

    monkeypatch.setattr(torch, "ones", launch)
    memory, key = HostCopy(), run_key("weight", "x", 0)
    for count in (3, 50):  # what was not locked is not unlocked, either
        run = torch.arange(float(count))
        copy = memory.take(Snapshot(0, 0, 1, 0, {key: run}))
        assert copy.runs[key].tolist() == run.tolist()
    assert launches == ["cuda", "cuda"]
    assert "could not be locked" in caplog.text
