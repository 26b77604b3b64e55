"""Why a rank ends that met an error nobody foresaw: by itself, or because another one is gone."""

from collections.abc import Callable
from typing import NamedTuple

from pipeline.distributed.meeting import is_communication_error
from pipeline.launching.verdict import Outcome, blamed_host


class Explanation(NamedTuple):
    """Why a rank ends.

    Attributes:
        message: in one line.
        outcome: failed by itself, or lost another rank.
        host: the node where it began, if that is known.
    """

    message: str
    outcome: Outcome
    host: str | None


def explain(
    error: Exception, host: str, waited: str, find_culprit: Callable[[], str | None]
) -> Explanation:
    """An unforeseen error in one line; after a broken collective, who broke it.

    Args:
        error: what this rank met.
        host: its node.
        waited: what it waited for, to end a message with.
        find_culprit: waits for what the ranks' watchdog finds, and gives it; None for nothing.
    """
    first_line = (str(error).strip().splitlines() or ["no message"])[0]
    message = f"{type(error).__name__}: {first_line}"
    if not is_communication_error(error):
        return Explanation(message, "failed", host)
    found = find_culprit()
    if found is None:
        return Explanation(message, "lost", None)
    return Explanation(f"stopping, because {found}{waited}", "lost", blamed_host(found))
