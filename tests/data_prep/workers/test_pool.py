"""Processes of one machine: as many as the work is worth, and heard of while they work."""

import time

import numpy as np
import pytest

from data_prep.workers import pool, pulse
from data_prep.workers.phase import FAST_BYTES_PER_WORKER, SLOW_BYTES_PER_WORKER, Done, Phase
from data_prep.workers.pool import LocalWorkers, processes_for
from tests.data_prep.conftest import Silence

MB = 1_000_000


class Listening(Silence):
    """An observer that keeps what was read."""

    def __init__(self) -> None:
        self.heard: list[int] = []

    def reading(self, text_bytes: int) -> None:
        """Keep it."""
        self.heard.append(text_bytes)


def phase_of(sizes: list[int], per_worker: int = FAST_BYTES_PER_WORKER) -> Phase:
    """Items of these sizes that take a while."""
    return Phase("encode", "encoding", read_slowly, lambda _: False, np.array(sizes), per_worker)


def read_slowly(item: int) -> Done:
    """An item that reads in two steps."""
    for _ in range(2):
        pulse.add(1000)
        time.sleep(0.3)
    return Done(tokens=item)


@pytest.mark.parametrize(
    ("megabytes", "per_worker", "processes"),
    [
        (0, FAST_BYTES_PER_WORKER, 1),
        (41, FAST_BYTES_PER_WORKER, 1),
        (160, FAST_BYTES_PER_WORKER, 1),
        (280, FAST_BYTES_PER_WORKER, 2),
        (41, SLOW_BYTES_PER_WORKER, 4),
        (4_000, FAST_BYTES_PER_WORKER, 8),
    ],
)
def test_workers_follow_from_the_work(
    megabytes: int, per_worker: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that takes longer to start than it saves is not started."""
    monkeypatch.setattr(pool, "default_processes", lambda: 8)
    phase = phase_of([megabytes * MB // 10] * 10, per_worker)
    assert processes_for(phase, np.arange(10)) == processes
    assert processes_for(phase, np.arange(0)) == 1


@pytest.mark.parametrize(("asked", "used"), [(None, 1), (1, 1), (2, 2), (3, 3)])
def test_what_was_asked_for_is_obeyed(
    asked: int | None, used: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--workers N starts N processes, however little there is to do."""
    seen: list[int] = []
    monkeypatch.setattr(pool, "work_through", lambda _w, _i, processes, *_: seen.append(processes))
    LocalWorkers(asked).run(phase_of([10] * 4), Silence())
    assert seen == [used]


@pytest.mark.parametrize("processes", [1, 2])
def test_reading_is_heard_of_within_an_item(
    processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The observer hears what was read before the first item is finished, from any process."""
    monkeypatch.setattr(pool, "_REPORT_S", 0.05)
    observer = Listening()
    LocalWorkers(processes).run(phase_of([10] * 2), observer)
    assert 1000 in observer.heard or 2000 in observer.heard
    assert max(observer.heard) >= 2000 * (3 - processes)
    assert observer.heard == sorted(observer.heard)
