"""How a run ended, as a file in its folder: srun's exit code does not say it.

The rank that fails first writes `verdict.json` before it ends; what the others say of the same
start are consequences and leave the file alone. Job scripts read it, people's own as well: it is
JSON with a key in each line.
"""

import json
import os
import re
import secrets
import socket
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from foundation.durable_files import discard, write_synced
from foundation.json_text import read_json

VERDICT_NAME = "verdict.json"
Outcome = Literal["done", "stopped", "refused", "failed", "lost"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
_MAX_BYTES = 1 << 16
_POLL_S = 0.1
# How messages that cross the ranks as text name who is at fault: the watchdog and the meeting by
# its process; the watch over hanging threads by the late rank, behind the bound that it exceeded.
_BLAMED = re.compile(
    r"\(process [\d, ]+ on ([^\s()]+)\)|\): rank \d+/\d+ \([^)]*\) on (\S+) (?:waits|is at) "
)


def start_of(environment: Mapping[str, str]) -> str:
    """Names one start of a job: a run that is queued again, or started by hand, has another one."""
    if "SLURM_JOB_ID" in environment:
        return f"{environment['SLURM_JOB_ID']}.{environment.get('SLURM_RESTART_COUNT', '0')}"
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    return f"{socket.gethostname()}:{os.getppid()}.{attempt}"


def blamed_host(message: str) -> str | None:
    """The node of the rank that a message blames; None when it blames none."""
    found = _BLAMED.search(message)
    return (found[1] or found[2]) if found else None


class Verdict:
    """The verdict on one start of a run, written by whichever rank knows it first.

    Args:
        run_dir: the run's folder.
        environment: the launcher's variables.
        rank: this rank.
    """

    def __init__(self, run_dir: Path, environment: Mapping[str, str], rank: int) -> None:
        self.path = run_dir / VERDICT_NAME
        self._start = start_of(environment)
        self._is_unique = "SLURM_JOB_ID" in environment
        self._begun_s = time.time()
        self._rank = rank

    def record(
        self,
        outcome: Outcome,
        message: str,
        *,
        exit_code: int,
        host: str | None = None,
        step: int | None = None,
    ) -> bool:
        """Write how this start ended, unless a rank has done so before.

        A folder that cannot be written loses the verdict and nothing else.

        Args:
            outcome: in a word.
            message: in a line.
            exit_code: of the rank that says so.
            host: the node where it happened, if it happened on one.
            step: the run's last step, if it has begun.

        Returns:
            Whether this rank is the one that says so; without a folder, rank 0 is.
        """
        content = {
            "start": self._start,
            "outcome": outcome,
            "exit_code": exit_code,
            "rank": self._rank,
            "host": host,
            "step": step,
            "message": " ".join(message.split()),
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        temporary = self.path.with_name(f"{VERDICT_NAME}.{secrets.token_hex(4)}.tmp")
        try:
            if self._is_known():
                return False
            self.path.unlink(missing_ok=True)
            text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
            write_synced(temporary, text.encode(errors="replace"))
            os.link(temporary, self.path)
        except FileExistsError:  # another rank was quicker
            return False
        except OSError:
            return self._rank == 0
        finally:
            discard(temporary)
        return True

    def clear(self) -> None:
        """Take away the verdict on an earlier start: this one has begun."""
        if not self._is_known():
            discard(self.path)

    def wait(self, timeout_s: float) -> None:
        """Wait until some rank has written the verdict on this start."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s and not self._is_known():
            time.sleep(_POLL_S)

    def _is_known(self) -> bool:
        """Whether the file is about this start.

        A shell that starts a run twice by hand is the same parent each time; then age decides.
        """
        found = read_verdict(self.path)
        if found is None or found.get("start") != self._start:
            return False
        try:
            return self._is_unique or self.path.stat().st_mtime >= self._begun_s
        except OSError:
            return False


def read_verdict(path: Path) -> dict[str, Any] | None:
    """The content of a verdict; None when it is missing or cannot be read."""
    try:
        content = read_json(path, _MAX_BYTES)
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
