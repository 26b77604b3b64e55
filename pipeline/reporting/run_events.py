"""What happened to a run besides its steps: resumes, new layouts, saves, skips and rollbacks.

Metrics read as if a run had never stopped, so its starts and saves are taken from rank 0's log.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from foundation.bounded_files import check_regular
from pipeline.reporting.metrics import Scalars
from pipeline.reporting.run_log import rank_log

Kind = Literal["resume", "layout", "skip", "rollback", "save"]
# As rank 0 writes them: Job._announce and Saver.
_LAYOUT = re.compile(r"INFO layout +(.*)")
_NEW = re.compile(r"INFO new run: step 0,")
_RESUMED = re.compile(r"INFO resumed from .*: step (\d+), tokens ")
_SAVED = re.compile(r"INFO saved .*/step_0*(\d+) in ")
_LONGEST_LINE = 1 << 16
_MAX_LOG_BYTES = 1 << 30


class Event(NamedTuple):
    """Something that happened to a run.

    Attributes:
        kind: what.
        step: the last step done before it.
    """

    kind: Kind
    step: int


def run_events(run_dir: Path, records: Sequence[Scalars]) -> list[Event]:
    """All that is known, by step; without a log that can be read, what the metrics say."""
    found = set(_of_records(records))
    with contextlib.suppress(OSError):
        found |= set(_of_log(rank_log(run_dir, 0)))
    return sorted(found, key=lambda event: (event.step, event.kind))


def _of_records(records: Sequence[Scalars]) -> Iterator[Event]:
    rollbacks = 0.0
    for record in records:
        step = int(record["step"] or 0)
        if record.get("skipped"):
            yield Event("skip", step)
        if (count := record.get("rollbacks") or 0.0) > rollbacks:
            yield Event("rollback", step)
            rollbacks = count


def _of_log(path: Path) -> Iterator[Event]:
    """Of rank 0's log, which every start appends to."""
    check_regular(path)
    if path.stat().st_size > _MAX_LOG_BYTES:
        raise OSError(f"it is larger than {_MAX_LOG_BYTES:,} bytes")
    layout = before = None
    with path.open(encoding="utf-8", errors="replace") as file:
        while line := file.readline(_LONGEST_LINE):
            if match := _LAYOUT.search(line):
                layout = match[1]
            elif _NEW.search(line):
                before = layout
            elif match := _RESUMED.search(line):
                yield Event("resume", int(match[1]))
                if before not in (None, layout):
                    yield Event("layout", int(match[1]))
                before = layout
            elif match := _SAVED.search(line):
                yield Event("save", int(match[1]))
