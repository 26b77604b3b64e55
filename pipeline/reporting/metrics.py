"""metrics.jsonl: one line per reported step, the truth that every other writer reads from."""

import json
import logging
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

from foundation.bounded_files import check_regular
from foundation.durable_files import write_whole
from foundation.json_text import parse_json
from model.errors import ConfigError

logger = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"
CHANGES_KEY = "resume_changes"
_MAX_LINE_BYTES = 1 << 20
_MAX_FILE_BYTES = 1 << 32
_LONGEST_KEY = 200  # letters

Value = float | bool | None
Scalars = dict[str, Value]
# A list holds one figure per pipeline stage.
Record = dict[str, Value | list[float]]


class MetricsWriter(Protocol):
    """Something that shows records elsewhere: TensorBoard, Weights & Biases, the progress line."""

    def write(self, record: Mapping[str, Value]) -> None:
        """Show one record."""

    def close(self) -> None:
        """Write out what is pending."""


class MetricsLog:
    """Appends records to a run's metrics.jsonl and hands each to the other writers.

    On resume, lines past the resumed step and torn lines are taken out first, so the file reads as
    if the run had never stopped. Only rank 0 has a file; on other ranks everything is a no-op.
    A full disk does not end a run: lines that cannot be written wait until they can. A file that
    was deleted meanwhile is written again from the one that is still open; what cannot be had back
    is said in the log.

    Args:
        run_dir: Folder of the run; None on ranks that write nothing.
        resumed_step: Last step that counts as done; 0 for a new run, which starts an empty file.
        writers: Where else records go, in this order.
        strict: Whether `sync` fails once lines are lost.
        changes: What the configuration differs in from that of the checkpoint; in the first record
            under `resume_changes`, of this file only.
    """

    def __init__(
        self,
        run_dir: Path | None,
        *,
        resumed_step: int,
        writers: Sequence[MetricsWriter] = (),
        strict: bool = False,
        changes: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self._writers = list(writers)
        self._file: FileIO | None = None
        self._end = 0  # of the last whole line in the file
        self._waiting = b""
        self._swapping = threading.Lock()
        self._strict = strict
        self._changes = [dict(change) for change in changes]
        self._loss: str | None = None
        self._path = (run_dir or Path()) / METRICS_NAME
        if run_dir is not None:
            run_dir.mkdir(parents=True, exist_ok=True)
            cut_after(self._path, resumed_step)
            self._file = FileIO(self._path, "a+")
            self._end = self._path.stat().st_size

    def write(self, record: Mapping[str, Value | list[float]]) -> None:
        """Append one record and hand it to the system; a number that is not finite becomes null.

        The other writers get the items of a list one by one, as `key_0`, `key_1`, ...
        """
        if self._file is None:
            return
        assert "step" in record, f"a record needs its step, got {sorted(record)}"
        finite = {key: _finite(value) for key, value in record.items()}
        line: dict[str, Any] = dict(finite)
        if self._changes:
            line[CHANGES_KEY], self._changes = self._changes, []
        self._waiting += (json.dumps(line, allow_nan=False) + "\n").encode()
        self._attend(self._file)
        self._write_waiting(self._file)
        scalars = scalars_of(finite)
        for writer in list(self._writers):
            try:
                writer.write(scalars)
            except OSError as error:
                self._writers.remove(writer)
                logger.warning(
                    "%s cannot write (%s) and gets no more records of this run; %s has them all",
                    type(writer).__name__,
                    error,
                    METRICS_NAME,
                )

    def _write_waiting(self, file: FileIO) -> None:
        """Append the lines that wait; a line that did not fit is taken out again."""
        try:
            written = file.write(self._waiting)
            if written != len(self._waiting):
                raise OSError(f"{written} of {len(self._waiting)} bytes written")
        except OSError as error:
            logger.warning("%s waits for room: %s", METRICS_NAME, error)
            file.truncate(self._end)
            return
        self._end += len(self._waiting)
        self._waiting = b""

    def _attend(self, file: FileIO) -> None:
        """See that lines go to the file under the name, whatever became of the last one."""
        try:
            own, found = os.fstat(file.fileno()), _stat(self._path)
            if found is None:
                self._write_again(file)
            elif (found.st_dev, found.st_ino) != (own.st_dev, own.st_ino):
                logger.error(
                    "%s was replaced by another file while the run went on; the next lines go to "
                    "that one",
                    self._path,
                )
                self._go_over_to(FileIO(self._path, "a+"), found.st_size)
            elif found.st_size < self._end:
                self._lose(f"{self._path} was cut from {self._end:,} to {found.st_size:,} bytes")
                self._end = found.st_size
        except OSError as error:
            logger.warning("%s cannot be looked at: %s", self._path, error)

    def _go_over_to(self, file: FileIO, end: int) -> None:
        with self._swapping:
            before, self._file, self._end = self._file, file, end
            if before is not None:
                before.close()

    def _write_again(self, file: FileIO) -> None:
        """Make a new file with the lines of the deleted one, which are there while it is open."""
        is_folder_gone = not self._path.parent.exists()
        try:
            content = os.pread(file.fileno(), self._end, 0)
        except OSError:
            content = b""
        lost = self._end - len(content)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._go_over_to(FileIO(self._path, "a+"), 0)
        self._waiting = content + self._waiting
        if is_folder_gone:
            logger.error(
                "%s was deleted while the run went on, with its checkpoints; it is made again, and "
                "nothing can be resumed before the next save",
                self._path.parent,
            )
        if lost:
            self._lose(f"{self._path} was deleted, and its first {lost:,} bytes cannot be read")
        else:
            logger.error(
                "%s was deleted while the run went on; its %d lines are written again",
                self._path,
                content.count(b"\n"),
            )

    def _lose(self, what: str) -> None:
        self._loss = what
        logger.error("%s while the run went on: lines of earlier steps are lost", what)

    def sync(self) -> None:
        """Bring the lines to the disk, so that they outlive a power cut as a checkpoint does.

        Other threads may call it while lines are written.

        Raises:
            OSError: they cannot be brought there; or lines are lost, and the log is strict.
        """
        if self._strict and self._loss is not None:
            raise OSError(f"{self._loss}: lines of earlier steps are lost")
        with self._swapping:
            if self._file is not None:
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file and all writers; later records are ignored."""
        if self._file is not None:
            self._attend(self._file)
            self._write_waiting(self._file)
            self._file.close()
            self._file = None
            for writer in self._writers:
                writer.close()


def scalars_of(record: Mapping[str, Value | list[float]]) -> Scalars:
    """A record with every list taken apart: `{"a": [1, 2]}` gives `{"a_0": 1, "a_1": 2}`.

    What changed at a resume is left out.
    """
    scalars: Scalars = {}
    for key, value in record.items():
        if key == CHANGES_KEY:
            continue
        if isinstance(value, list):
            scalars |= {f"{key}_{index}": item for index, item in enumerate(value)}
        else:
            scalars[key] = value
    return scalars


def read_metrics(path: str | Path) -> list[Scalars]:
    """All records of a metrics file, or of the run folder it lies in, oldest first.

    Lists come taken apart, see `scalars_of`.

    A last line without its end, as a killed or still writing run leaves it, is not a record yet.

    Raises:
        ConfigError: There is no such file, or a line in it is not a record.
    """
    path = Path(path)
    if path.is_dir():
        path = path / METRICS_NAME
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; give the folder of a run that has started")
    records = []
    try:
        for number, line in enumerate(_whole_lines(path), start=1):
            record = _parse(line)
            if record is None:
                raise ConfigError(f"{path}: line {number} is not a record; delete that line")
            records.append(scalars_of(record))
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror or error}); give the folder of a run"
        ) from error
    return records


def cut_after(path: Path, step: int) -> int:
    """Take out of a metrics file what lies past `step` and what is torn, in one rename.

    Returns:
        The number of lines taken out.
    """
    if not path.exists():
        return 0
    kept, size, lines = [], 0, 0
    for line in _whole_lines(path):
        record = _parse(line)
        lines += 1
        size += len(line) + 1
        if record is not None and record["step"] <= step:
            kept.append(line + b"\n")
    content = b"".join(kept)
    torn = path.stat().st_size > size
    if lines == len(kept) and not torn:
        return 0
    write_whole(path, content)
    return lines + torn - len(kept)


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _whole_lines(path: Path) -> Iterator[bytes]:
    """Lines that were written to their end; of one that is too long to be a record, its beginning.

    Raises:
        OSError: the file cannot be read, is no regular one, or is too large.
    """
    check_regular(path)
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise OSError(f"it is larger than {_MAX_FILE_BYTES:,} bytes")
    with path.open("rb") as file:
        while line := file.readline(_MAX_LINE_BYTES):
            if line.endswith(b"\n"):
                yield line[:-1]
            elif len(line) == _MAX_LINE_BYTES:
                yield line


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = parse_json(line)
    except ValueError:
        return None
    if isinstance(record, dict) and type(record.get("step")) is int and record["step"] >= 0:
        return record if all(map(_is_figure, record, record.values())) else None
    return None


def _is_figure(key: str, value: object) -> bool:
    """Whether a record may hold this: a number under a name that can be shown, or several."""
    if key == CHANGES_KEY:
        return True
    values = value if isinstance(value, list) else [value]
    numbers = all(one is None or isinstance(one, bool | int | float) for one in values)
    return numbers and len(key) <= _LONGEST_KEY and key.isprintable()


def _finite(value: Value | list[float]) -> Value | list[float]:
    return None if isinstance(value, float) and not math.isfinite(value) else value
