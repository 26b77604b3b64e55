"""Who is late, from what the ranks noted in their store."""

import time

import torch.distributed as dist

from pipeline.diagnosis.time_limit import _BEAT_S, TimeLimit
from pipeline.distributed.rendezvous import RankInfo


def _limits(ranks: int) -> list[TimeLimit]:
    """Those of ranks that share a store, all of which beat."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    return [
        TimeLimit(store, RankInfo(rank, rank, ranks), 600, lambda: None) for rank in range(ranks)
    ]


def test_the_rank_that_is_still_in_a_check_is_named() -> None:
    """Others have looked."""
    first, second = _limits(2)
    with first.watch("x"), second.watch("x"):
        time.sleep(2 * _BEAT_S)
        first.looked(None)
        assert first._late().startswith("rank 1 on ")
        assert "still in it" in first._late()


def test_the_rank_that_has_not_come_is_named() -> None:
    """It hangs between two checks."""
    first, _second = _limits(2)
    with first.watch("x"):
        first.looked(None)
        assert "rank 1 did not come to it" in first._late()


def test_the_rank_that_failed_while_others_wait_is_named() -> None:
    """Its error is the reason, not the ranks that wait for it."""
    first, second = _limits(2)
    with first.watch("x"), second.watch("x"):
        second.looked("RuntimeError: the device is gone")
        assert "rank 1 failed there (RuntimeError: the device is gone)" in first._late()


def test_a_rank_without_a_sign_of_life_is_named_first() -> None:
    """A process that is frozen may have looked before."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    alive = TimeLimit(store, RankInfo(0, 0, 2), 600, lambda: None)
    with alive.watch("x"):
        store.set("1/begun/1", "a")
        store.set("1/looked/1", "")
        assert alive._late().startswith("rank 1 on a shows no sign of life")
