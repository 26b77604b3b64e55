"""`run.notify`: a command of the user's that hears how a run ended, once.

Mail, chats and pagers are as many as there are sites, so the run knows none of them: a shell
command gets what happened in environment variables. It never changes how the run ends.
"""

import logging
import os
import subprocess
import tempfile
from collections.abc import Mapping
from typing import NamedTuple

from foundation.shown_text import printable
from pipeline.config.sections import RunSection
from pipeline.launching.verdict import Outcome

logger = logging.getLogger(__name__)

# In a launcher's environment: it tells the end of the job itself, since it may start it again.
BY_LAUNCHER = "HEADWAY_NOTIFIED_BY"
TIME_LIMIT_S = 30
_KILL_AFTER_S = 5
_LONGEST_REASON = 4000  # letters; the system takes no variable of any length
_SHOWN_BYTES = 2000


class Ending(NamedTuple):
    """How a run ended.

    Attributes:
        outcome: in a word, that of the verdict.
        reason: in a line.
        step: the run's last step; None before the first.
    """

    outcome: Outcome
    reason: str
    step: int | None


def notify(run: RunSection, ending: Ending) -> None:
    """Run the command, if there is one, and wait for it; what goes wrong is a warning.

    The command is in a session of its own and bounded by itself: it goes on when the launcher ends
    this process meanwhile, as torchrun and srun do when one rank has failed.

    Args:
        run: of the configuration.
        ending: what is told.
    """
    if run.notify is None:
        return
    bounded = ["timeout", f"--kill-after={_KILL_AFTER_S}", str(TIME_LIMIT_S)]
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(
                [*bounded, "/bin/sh", "-c", run.notify],
                env={**os.environ, **variables(run, ending)},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            status = process.wait(TIME_LIMIT_S + 2 * _KILL_AFTER_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            logger.warning("run.notify could not be run: %s", error)
            return
        if status:
            logger.warning(
                "run.notify ended with status %d%s: %s",
                status,
                f" after {TIME_LIMIT_S} s, its time limit" if status in (124, 137) else "",
                _last_line(os.pread(said.fileno(), _SHOWN_BYTES, 0)) or "it said nothing",
            )


def notify_as_rank(run: RunSection, ending: Ending, environment: Mapping[str, str]) -> None:
    """The same for a rank: nothing where the launcher tells the end of the job."""
    if not environment.get(BY_LAUNCHER):
        notify(run, ending)


def variables(run: RunSection, ending: Ending) -> Mapping[str, str]:
    """What the command finds in its environment."""
    return {
        "HEADWAY_STATUS": ending.outcome,
        "HEADWAY_RUN": run.name,
        "HEADWAY_STEP": "" if ending.step is None else str(ending.step),
        "HEADWAY_RUN_DIR": str(run.dir.absolute()),
        "HEADWAY_REASON": printable(" ".join(ending.reason.split()), _LONGEST_REASON),
    }


def _last_line(output: bytes) -> str:
    lines = [line for line in output.decode(errors="replace").splitlines() if line.strip()]
    return printable(lines[-1].strip()) if lines else ""
