"""Links between stages: how they connect, and how waiting is measured on a GPU's stream."""

import os
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.engine.build import build_engine
from pipeline.stages.links import IdleClock, StageLinks
from tests.support.engine_cases import Case, build_topology, engine_config, local_batches
from tests.support.harness import run_ranks

CASE = Case(world=3, zero=1, accumulation=4, stages="trunk 0-2|heads 1-2|heads 3")


def _train_over_slow_connections() -> list[float]:
    """A step where two ranks block in their first transfer until both begin it, as with NCCL."""
    store = dist.distributed_c10d._get_default_store()
    connected: set[str] = set()

    def connecting(transfer: Any) -> Any:
        def connect_first(tensor: Any, peer: int, group: Any) -> Any:
            me = dist.get_rank()
            pair = f"{group.group_name}/{min(me, peer)}-{max(me, peer)}"
            if pair not in connected:
                store.set(f"{pair}/{me}", "here")
                store.wait([f"{pair}/{peer}"], timedelta(seconds=15))
                connected.add(pair)
            return transfer(tensor, peer, group=group)

        return connect_first

    dist.isend, dist.irecv = connecting(dist.isend), connecting(dist.irecv)
    topology = build_topology(CASE)
    engine = build_engine(engine_config(CASE), topology, "fp32")
    assert len(connected) == (4 if os.environ["RANK"] == "1" else 2)  # the middle one has two pairs
    batches = local_batches(0, CASE, topology.data_rank)
    return engine.train_step(batches, learning_rate=1e-3).head_losses.tolist()


def test_neighbors_connect_without_waiting_for_each_other() -> None:
    """Links connect before the first step, in one order: later each end begins with another one."""
    losses = run_ranks(3, _train_over_slow_connections)
    assert losses[0] == losses[1] == losses[2]
    assert all(loss > 0 for loss in losses[0])


def _count_waiting() -> tuple[float, float, float]:
    topology = build_topology(CASE)
    links = StageLinks(topology, torch.float32)
    untouched = links.clock.take()
    with links.clock.step():
        links.clock.wait(_Sleep(0.05), "a nap")
    with links.clock.uncounted():
        links.clock.wait(_Sleep(0.05), "a nap")
    waited, elapsed = links.clock.take()
    assert links.clock.take() == (0.0, 0.0)
    return untouched[0], waited, elapsed


class _Sleep:
    """A transfer that takes its time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def wait(self) -> None:
        """Wait for it."""
        time.sleep(self.seconds)


def test_connecting_and_validation_are_no_idle_time() -> None:
    """Only waits of steps count."""
    for untouched, waited, elapsed in run_ranks(3, _count_waiting):
        assert untouched == 0.0
        assert 0.05 <= waited <= elapsed < 0.099


class _Stream:
    """A GPU's stream: what it is given takes time there, while the process runs ahead.

    Attributes:
        queued_s: when the stream will have done all it was given.
        now_s: how far it is.
    """

    def __init__(self) -> None:
        self.queued_s = 0.0
        self.now_s = 0.0


class _Event:
    """The part of torch.cuda.Event that the clock uses."""

    stream: _Stream

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing
        self.at_s = float("inf")

    def record(self) -> None:
        """At the end of what was queued so far."""
        self.at_s = self.stream.queued_s

    def query(self) -> bool:
        """Whether the stream has come here."""
        return self.at_s <= self.stream.now_s

    def synchronize(self) -> None:
        """Let the stream come here."""
        self.stream.now_s = max(self.stream.now_s, self.at_s)

    def elapsed_time(self, end: "_Event") -> float:
        """Milliseconds between two events that have happened."""
        assert self.query()
        assert end.query()
        return (end.at_s - self.at_s) * 1000


class _Transfer:
    """Work that holds up the stream, not the process."""

    def __init__(self, stream: _Stream, seconds: float) -> None:
        self.stream, self.seconds = stream, seconds

    def wait(self) -> None:
        """The stream waits."""
        self.stream.queued_s += self.seconds


def test_on_a_gpu_the_stream_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Share and culprit come from events, though the process is done long before the stream."""
    stream = _Stream()
    monkeypatch.setattr(_Event, "stream", stream, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    clock = IdleClock(torch.device("cuda"))
    with clock.step():
        stream.queued_s += 3.0  # computing
        clock.wait(_Transfer(stream, 1.0), "the activations")
        stream.queued_s += 5.0
        clock.wait(_Transfer(stream, 2.0), "the gradients")
        stream.queued_s += 1.0
    said = []
    for now in (1.0, 3.5, 6.0, 9.5, 11.5):
        stream.now_s = now
        said.append(clock.waiting_for)
    assert said == [None, "the activations", None, "the gradients", None]
    with clock.uncounted():
        clock.wait(_Transfer(stream, 7.0), "validation")
    assert clock.take() == pytest.approx((3.0, 12.0))
    with clock.step():
        clock.wait(_Transfer(stream, 1.0), "the activations")
    assert clock.take() == pytest.approx((1.0, 1.0))
