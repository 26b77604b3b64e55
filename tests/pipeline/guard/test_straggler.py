"""The rank that all others wait for is named, by its own time and not by that of a step."""

import json
import logging
import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipeline.distributed.rendezvous import rank_info
from pipeline.distributed.topology import Topology
from pipeline.guard.straggler import OwnTime, Slowest, Stragglers, slowest
from tests.support.harness import run_ranks
from tests.support.slow_rank import compute
from tests.support.training_runs import start_job


def test_ranks_are_compared_within_their_stage() -> None:
    """A stage with more to do is no straggler; a rank that is slower than its neighbors is."""
    assert slowest([1.0, 1.0, 1.0, 4.0, 4.4, 4.0], 3) == Slowest(4, 4.4, 4.0)
    assert slowest([1.0, 1.5, 1.0, 4.0, 4.4, 4.0], 3).rank == 1
    assert Slowest(4, 4.4, 4.0).ratio == pytest.approx(1.1)


def _own_times(slow_rank: int) -> tuple[float, float, float]:
    """Ten steps in lockstep, of which one rank needs longer; step time, own time, again none."""
    own = OwnTime()
    started_s = time.perf_counter()
    for _ in range(10):
        own.start()
        compute(0.15 if dist.get_rank() == slow_rank else 0.03)
        dist.all_reduce(torch.zeros(1))
        own.stop()
    seconds = time.perf_counter() - started_s
    return seconds, own.take(), own.take()


def test_own_time_leaves_waiting_out() -> None:
    """Both ranks' steps last alike; of the quick one most is waiting."""
    quick, slow = run_ranks(2, _own_times, 1)
    assert 0.25 < quick[1] < 0.6 * quick[0], "it waited for most of the time"
    assert slow[1] > 0.8 * slow[0], "it never waited"
    assert quick[2] == slow[2] == 0, "what was taken is not taken again"


def _warnings(reports: list[list[float]]) -> list[str]:
    """What rank 0 logs while all ranks see these own times, of ten steps each."""
    messages: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger = logging.getLogger("pipeline.guard.straggler")
    logger.setLevel(logging.INFO)
    logger.addHandler(Kept())
    topology = Topology(rank_info(os.environ), 1, torch.device("cpu"))
    stragglers = Stragglers(topology, ["node1", "node2"])
    for own_s in reports:
        stragglers.report(own_s, 10)
    return messages


def test_who_is_slow_for_long_is_told_once() -> None:
    """Not for a single slow window, not again and again; and the end of it is told, too."""
    even, slow = [11.0, 11.0], [11.0, 22.0]
    first, second = run_ranks(2, _warnings, [slow, even, slow, slow, slow, slow, *[even] * 5])
    assert second == []
    assert len(first) == 2, first
    assert first[0].startswith("rank 1/2 (stage 0, tp 0, dp 1) on node2 takes 2.2 s of a step")
    assert first[1] == "no rank is slower than the others any more"


def test_a_slowed_rank_of_a_run_is_named(config: Path, tmp_path: Path) -> None:
    """In the log with its node, and in the metrics; through the real trainer."""
    settings = ["train.steps=20", "eval.every_steps=0", "checkpoint.every_steps=0"]
    arguments = [str(config), "--set", *settings, "log.interval=5"]
    job = start_job(tmp_path, arguments, world=2, module="tests.support.slow_rank")
    outcome = job.finish()
    assert outcome.codes == [0, 0], outcome.output
    (line,) = [line for line in outcome.output[0].splitlines() if "again and again" in line]
    assert "rank 1/2 (stage 0, tp 0, dp 1) on " in line
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records[1:]:  # the first steps of a process take what they take
        assert record["slowest_rank"] == 1
        assert record["slowest_rank_time_s"] > 0.25
        assert record["median_rank_time_s"] < record["slowest_rank_time_s"]
