"""A check: what each rank looks at, and what all ranks make of it together."""

import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data_prep.errors import DataError
from model.errors import ConfigError
from pipeline.config.run_config import Precision, RunConfig
from pipeline.diagnosis.time_limit import TimeLimit
from pipeline.distributed.agreement import from_all
from pipeline.distributed.rendezvous import RankInfo
from pipeline.distributed.topology import Topology

_SHOWN = 4
_OURS = (ConfigError, DataError, OSError)


@dataclass(frozen=True)
class Context:
    """What checks look at.

    Attributes:
        config: the run.
        info: this rank's position.
        device: where it computes.
        precision: arithmetic of the run.
        topology: the grid of ranks; None where the ranks are not those of the run.
        folder: of the checks' own files, in the run's folder.
        meeting: where the ranks met and how long that took, in words.
        full: whether shards are read whole.
        seen_within_s: how long a network file system may take to show elsewhere what is new.
    """

    config: RunConfig
    info: RankInfo
    device: torch.device
    precision: Precision
    topology: Topology | None
    folder: Path
    meeting: str
    full: bool
    seen_within_s: float


class Outcome(NamedTuple):
    """What a check found; the same on all ranks.

    Attributes:
        figure: in words, for the check's line.
        problems: what to mend, each with its way out.
    """

    figure: str
    problems: Sequence[str] = ()


class Failed(NamedTuple):
    """What a rank has in place of a value when looking failed.

    Attributes:
        reason: in one line.
    """

    reason: str


@dataclass(frozen=True)
class Check:
    """One question to the cluster.

    Attributes:
        name: for its line.
        look: called on every rank, which may be a collective; gives a value that can be pickled.
        judge: called on every rank with all ranks' values, in rank order.
        patience: how many times the time limit it may take.
    """

    name: str
    look: Callable[[Context], Any]
    judge: Callable[[Context, list[Any]], Outcome]
    patience: float = 1.0


class Line(NamedTuple):
    """A check that was made.

    Attributes:
        name: of the check.
        outcome: what it found.
    """

    name: str
    outcome: Outcome


class BrokenOffError(Exception):
    """A check could not be made to its end, since ranks no longer hear of each other."""


def run_checks(checks: Iterable[Check], context: Context, limit: TimeLimit) -> Iterator[Line]:
    """Make one check after the other, all ranks together.

    A rank whose look fails says so instead of a value.

    Raises:
        BrokenOffError: a rank has ended meanwhile.
    """
    for check in checks:
        with limit.watch(check.name, check.patience):
            try:
                outcome = _outcome(check, context, limit)
            except Exception as error:
                raise BrokenOffError(
                    f"the check {check.name!r} broke off ({_first_line(error)}); a rank has ended, "
                    "or its node: look at the other ranks' output, and start again without it"
                ) from error
        yield Line(check.name, outcome)


def _outcome(check: Check, context: Context, limit: TimeLimit) -> Outcome:
    value: Any
    try:
        value = check.look(context)
    except Exception as error:
        value = Failed(_first_line(error))
    limit.looked(value.reason if isinstance(value, Failed) else None)
    values = from_all((socket.gethostname(), value))
    hosts = [host for host, _ in values]
    failed = {rank: v.reason for rank, (_, v) in enumerate(values) if isinstance(v, Failed)}
    return _of_failures(failed, hosts) if failed else check.judge(context, [v for _, v in values])


def _first_line(error: Exception) -> str:
    message = (str(error).strip().splitlines() or ["no message"])[0]
    # Ours say all that there is to say.
    return message if isinstance(error, _OURS) else f"{type(error).__name__}: {message}"


def _of_failures(failures: dict[int, str], hosts: list[str]) -> Outcome:
    shown = [f"rank {rank} on {hosts[rank]}: {failures[rank]}" for rank in list(failures)[:_SHOWN]]
    more = len(failures) - len(shown)
    if more > 0:
        shown.append(f"and {more} more ranks")
    return Outcome(f"failed on {len(failures)} of {len(hosts)} ranks", shown)


def ranks_text(ranks: Sequence[int]) -> str:
    """Numbers of ranks, the first few of many."""
    shown = ", ".join(map(str, ranks[:_SHOWN]))
    more = len(ranks) - _SHOWN
    text = f"rank{'s' if len(ranks) > 1 else ''} {shown}"
    return f"{text} and {more} more" if more > 0 else text
