"""A main thread that hangs: its bound, who is late, and a real job that ends with stacks."""

import os
import re
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipeline.distributed.rendezvous import rank_info
from pipeline.distributed.topology import Topology
from pipeline.guard.progress import Progress
from pipeline.guard.stall import Place, StallWatch, late, verdict, where
from tests.support.harness import run_ranks


def test_the_bound_is_ten_times_the_longest() -> None:
    """Of the phases of a kind; before the first there is a wide one, and never one below."""
    now = [0.0]
    progress = Progress(least_s=60, unknown_s=3600, clock=lambda: now[0])
    assert progress.bound_s("start") == progress.bound_s("step") == 3600
    for took in (100.0, 2.0, 7.0, 3.0):
        now[0] += took
        progress.enter("step")
    assert progress.bound_s("start") == 1000
    assert progress.bound_s("step") == 70
    assert progress.bound_s("save") == 3600
    for _ in range(100):
        now[0] += 1.0
        progress.enter("step")
    assert progress.bound_s("step") == 60, "the slow ones are long ago"
    assert (progress.learned("step"), progress.learned("save")) == (100, 0)


def test_the_bound_of_a_save_comes_from_whole_saves() -> None:
    """The main thread only begins one; the last save of a run, which it waits for, takes it all."""
    now = [0.0]
    progress = Progress(least_s=60, unknown_s=3600, clock=lambda: now[0])
    for phase in ("save", "step", "save", "step"):
        progress.enter(phase)
        now[0] += 0.1
    assert progress.bound_s("save") == 3600
    progress.took("save", 90.0)
    assert progress.bound_s("save") == 900
    assert progress.bound_s("step") == 60


def _place(rank: int, number: int, collective: str | None = None) -> Place:
    return Place(f"rank {rank}/4", f"node{rank}", number, "step", 61.0, "a.py:1 (f)", collective)


def test_fewer_phases_are_late() -> None:
    """Whatever the others do."""
    places = [_place(0, 7, "all_reduce"), _place(1, 6, "all_reduce"), _place(2, 7)]
    assert late(places) == [places[1]]


def test_among_equals_those_in_no_collective_are_late() -> None:
    """The others wait for them."""
    places = [_place(0, 7, "all_reduce"), _place(1, 7), _place(2, 7, "barrier")]
    assert late(places) == [places[1]]
    told = verdict(places, 60.0, 5)
    assert told.startswith("nothing has moved for more than 60 s (ten times the longest of 5): ")
    assert "rank 1/4 on node1 is at a.py:1 (f)" in told
    assert "of the others rank 0/4 on node0 waits in all_reduce at a.py:1 (f)" in told


@pytest.mark.parametrize("collective", [None, "all_reduce"])
def test_when_all_are_alike_none_is_blamed(collective: str | None) -> None:
    """A network that is cut makes all wait."""
    places = [_place(0, 7, collective), _place(1, 7, collective)]
    assert late(places) == []
    assert "no rank is behind the others" in verdict(places, 60.0, 0)


def test_where_a_thread_is_names_our_innermost_line() -> None:
    """And no collective, when it is in none."""
    stop = threading.Event()

    def wait() -> None:
        stop.wait()

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.1)
    line, collective = where(sys._current_frames()[thread.ident or 0])
    stop.set()
    thread.join()
    assert re.fullmatch(r"tests/pipeline/guard/test_stall\.py:\d+ \(wait\)", line)
    assert collective is None


def _hang(folder: Path) -> str:
    """Three quick steps, and then rank 1 does not come to the barrier."""
    topology = Topology(rank_info(os.environ), 1, torch.device("cpu"))
    ended = threading.Event()
    told: list[str] = []

    def abort(text: str) -> None:
        told.append(text)
        ended.set()

    progress = Progress(least_s=2.0, unknown_s=60.0)
    watch = StallWatch(topology, progress, host="here", run_dir=folder, abort=abort)
    for _ in range(3):
        progress.enter("step")
        dist.barrier()
    progress.enter("step")
    if topology.info.rank == 1:
        _sleep_until(ended)
    dist.barrier()  # rank 1 comes once it has been found
    assert ended.wait(30)
    watch.close()
    return told[0]


def _sleep_until(ended: threading.Event) -> None:
    while not ended.is_set():
        time.sleep(0.05)


def test_a_rank_that_hangs_is_named_with_its_stack(tmp_path: Path) -> None:
    """On both ranks alike, within seconds; the stacks of both are written."""
    first, second = run_ranks(2, _hang, tmp_path)
    for told in (first, second):
        assert "rank 1/2" in told.partition("of the others")[0]
        assert "(_sleep_until)" in told or "(wait)" in told
        assert "waits in barrier" in told.partition("of the others")[2]
    (folder,) = (tmp_path / "stalls").iterdir()
    assert "_sleep_until" in (folder / "rank_00001.txt").read_text()
    assert "barrier" in (folder / "rank_00000.txt").read_text()
    assert "rank 1/2" in (folder / "summary.txt").read_text()
