"""Input files to units of work.

A unit is a run of byte ranges that depends on the inputs alone, never on the number of workers.
A record starts in exactly one unit: a range of a .jsonl file holds the lines that START in it,
wherever they end, and one of a .parquet file the row groups; every other file is in one unit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from data_prep.inputs.input_files import InputFile

SMALLEST_UNIT_BYTES = 1 << 20
LARGEST_UNIT_BYTES = 1 << 26
UNITS_WANTED = 64


class Segment(NamedTuple):
    """The bytes [start, end) of an input file, which is number `file` of the job."""

    file: int
    input: InputFile
    start: int
    end: int


@dataclass(frozen=True)
class Unit:
    """One claimable piece of work: its number names its shard files and its journal entry."""

    number: int
    segments: tuple[Segment, ...]

    @property
    def bytes(self) -> int:
        """Input bytes of this unit."""
        return sum(segment.end - segment.start for segment in self.segments)


def plan_units(files: Sequence[InputFile], unit_bytes: int) -> list[Unit]:
    """Cut the inputs into units of about `unit_bytes`, from the inputs alone.

    Example: files of 3, 3 and 10 MiB (jsonl) at 4 MiB give [0:3 + 3:6 of the first two],
    [0:4], [4:8], [8:10] of the third.
    """
    units: list[Unit] = []
    pending: list[Segment] = []
    pending_bytes = 0

    def close() -> None:
        nonlocal pending_bytes
        if pending:
            units.append(Unit(len(units), tuple(pending)))
            pending.clear()
        pending_bytes = 0

    for number, file in enumerate(files):
        if file.bytes > unit_bytes:
            close()
            step = unit_bytes if file.is_splittable else file.bytes
            for start in range(0, file.bytes, step):
                pending.append(Segment(number, file, start, min(start + step, file.bytes)))
                close()
            continue
        pending.append(Segment(number, file, 0, file.bytes))
        pending_bytes += file.bytes
        if pending_bytes >= unit_bytes:
            close()
    close()
    return units


def choose_unit_bytes(total_bytes: int) -> int:
    """A power of two that gives about 64 units, between 1 MiB and 64 MiB."""
    wanted = 1 << max(0, (total_bytes // UNITS_WANTED).bit_length() - 1)
    return min(max(wanted, SMALLEST_UNIT_BYTES), LARGEST_UNIT_BYTES)
