"""Checks of the run's shards: on every rank the same ones, whole, and read as in training."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from data_prep.shards.shard_set import ShardSet
from pipeline.data.samples import open_shards, training_samples
from pipeline.diagnosis.check import Check, Context, Outcome, ranks_text

_FULL_PATIENCE = 1000
_SHOWN = 4


class _Data(NamedTuple):
    """What a rank sees.

    Attributes:
        fingerprint: of the training split.
        size: bytes of its files.
        tokens: of it.
        batch_s: seconds to read this rank's first step; 0 where the ranks are not those of the run.
    """

    fingerprint: str
    size: int
    tokens: int
    batch_s: float


def _data(context: Context) -> _Data:
    shards: ShardSet = open_shards(context.config)
    batch_s = 0.0
    if context.topology is not None:
        topology = context.topology
        loader = training_samples(
            context.config, shards, data_rank=topology.data_rank, data_size=topology.data_size
        )
        started = time.perf_counter()
        loader.step_batches(0)
        batch_s = time.perf_counter() - started
    return _Data(shards.fingerprint, shards.total_bytes, shards.num_tokens, batch_s)


def _judge_data(context: Context, ranks: list[_Data]) -> Outcome:
    shards, main = context.config.data.shards, ranks[0]
    others = [rank for rank, found in enumerate(ranks) if found.fingerprint != main.fingerprint]
    problems = []
    if others:
        problems.append(
            f"data.shards={shards} is another set on {ranks_text(others)} than on rank 0; give "
            "all nodes the same files"
        )
    slowest = max(found.batch_s for found in ranks)
    read = f", a step's samples read in {slowest * 1000:.0f} ms" if slowest else ""
    return Outcome(
        f"{main.tokens:,} tokens, {main.size / 2**30:.3g} GiB, seen by {len(ranks)} ranks{read}",
        problems,
    )


def data_checks(find_problems: Callable[[Path], Iterable[str]]) -> tuple[Check, ...]:
    """The checks; with `Context.full` rank 0 also reads every shard from end to end.

    Args:
        find_problems: gives a line for each thing that is wrong with a set.
    """

    def verify(context: Context) -> list[str]:
        if not context.full or context.info.rank:
            return []
        return list(find_problems(context.config.data.shards))

    def judge(context: Context, ranks: list[list[str]]) -> Outcome:
        found = ranks[0]
        if not context.full:
            return Outcome("sizes by the manifest; --full reads every shard")
        if not found:
            return Outcome("read from end to end, whole")
        shown = [f"{problem}; make or copy the shards again" for problem in found[:_SHOWN]]
        return Outcome(f"{len(found)} problems", shown)

    return (
        Check("data", _data, _judge_data, patience=2),
        Check("shards", verify, judge, patience=_FULL_PATIENCE),
    )
