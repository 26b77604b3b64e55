"""What a job reads: sources to input files, files to units of work, and the unit list on disk.

The plan follows from the inputs alone. Units of one source follow those of the source before it,
and no unit has files of two sources. Workers, ranks and array tasks look a unit up by its number
in journal/units.jsonl, so none of them holds the whole list.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter

from data_prep.building.journal import JOURNAL
from data_prep.building.options import BuildOptions, Source
from data_prep.errors import DataError, shown
from data_prep.inputs.input_files import InputFile, LeftOut, find_inputs
from data_prep.inputs.units import Unit, choose_unit_bytes, plan_units
from data_prep.shards.atomic import whole_file

UNITS = "units.jsonl"
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class PlannedUnit:
    """A unit and the number of the source it belongs to."""

    source: int
    unit: Unit


class Plan(NamedTuple):
    """All that a job reads; `file_sources[i]` is the number of the source of `files[i]`."""

    sources: tuple[Source, ...]
    files: list[InputFile]
    file_sources: list[int]
    units: list[PlannedUnit]
    unit_bytes: int

    @property
    def total_bytes(self) -> int:
        """Size of all input files."""
        return sum(file.bytes for file in self.files)


_PLANNED_UNIT = TypeAdapter(PlannedUnit)


def make_plan(options: BuildOptions, left_out: LeftOut | None = None) -> Plan:
    """Find the inputs of every source and cut them into units.

    Args:
        options: Name the inputs.
        left_out: Gathers what folders hold and is not taken.

    Raises:
        DataError: A source has no files, or a file belongs to two sources.
    """
    sources = options.all_sources
    found = [
        find_inputs(
            source.inputs, source.globs or (), source.exclude or (), options.output, left_out
        )
        for source in sources
    ]
    owner: dict[str, str] = {}
    for source, files in zip(sources, found, strict=True):
        for file in files:
            if file.path in owner:
                raise DataError(
                    f"{shown(file.path)} is in the sources {owner[file.path]} and {source.name}; "
                    "leave it out of one of them with exclude"
                )
            owner[file.path] = source.name
    del owner
    total_bytes = sum(file.bytes for files in found for file in files)
    unit_bytes = options.unit_bytes or choose_unit_bytes(total_bytes)
    plan = Plan(sources, [], [], [], unit_bytes)
    for number, files in enumerate(found):
        plan.units.extend(
            PlannedUnit(number, unit)
            for unit in _renumber(plan_units(files, unit_bytes), len(plan.units), len(plan.files))
        )
        plan.files.extend(files)
        plan.file_sources.extend([number] * len(files))
    return plan


def _renumber(units: Sequence[Unit], first_unit: int, first_file: int) -> Iterator[Unit]:
    """Units and files of one source, counted on from those of the sources before it."""
    for unit in units:
        segments = tuple(
            segment._replace(file=segment.file + first_file) for segment in unit.segments
        )
        yield Unit(unit.number + first_unit, segments)


def write_units(output: Path, units: Sequence[PlannedUnit]) -> None:
    """Write the unit list of a job, one line per unit in order."""
    with whole_file(output / JOURNAL / UNITS) as temporary, open(temporary, "wb") as lines:
        for unit in units:
            lines.write(_PLANNED_UNIT.dump_json(unit) + b"\n")


def are_units_written(output: Path, units: Sequence[PlannedUnit]) -> bool:
    """Whether the unit list on disk is that of the plan, byte for byte."""
    try:
        with open(output / JOURNAL / UNITS, "rb") as lines:
            as_planned = all(
                lines.read(len(line)) == line
                for line in (_PLANNED_UNIT.dump_json(unit) + b"\n" for unit in units)
            )
            return as_planned and not lines.read(1)
    except OSError:
        return False


class UnitList:
    """The units of a job, read from its journal one at a time.

    Args:
        output: Folder of the shard set.

    Raises:
        DataError: The list cannot be read.
    """

    def __init__(self, output: Path) -> None:
        self._path = output / JOURNAL / UNITS
        # Byte offsets of the lines: 8 bytes per unit, whatever its number of files.
        self._starts = array("q", [0])
        position = 0
        try:
            with self._path.open("rb") as lines:
                while block := lines.read(_READ_BYTES):
                    line_end = block.find(b"\n")
                    while line_end >= 0:
                        self._starts.append(position + line_end + 1)
                        line_end = block.find(b"\n", line_end + 1)
                    position += len(block)
        except OSError as error:
            raise DataError(
                f"cannot read {self._path}: {error.strerror or error}; run the same command again"
            ) from error

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: int) -> PlannedUnit:
        """Read one unit."""
        start, end = self._starts[number], self._starts[number + 1]
        with self._path.open("rb") as lines:
            lines.seek(start)
            return _PLANNED_UNIT.validate_json(lines.read(end - start))


@lru_cache(maxsize=1)
def unit_list(output: Path, job_id: str) -> UnitList:  # the id tells jobs in one folder apart
    """The unit list of a job, indexed once per process."""
    del job_id
    return UnitList(output)
