"""Units of work to records: each kind of input by its reader."""

import itertools
import json
from bisect import bisect_left
from collections.abc import Iterator

from data_prep.errors import DataError
from data_prep.inputs.arrow_inputs import read_arrow, read_parquet, read_parquet_row
from data_prep.inputs.codecs import DamagedInputError, open_stream
from data_prep.inputs.hub_dataset import fetch, local_path
from data_prep.inputs.input_files import InputFile, check_unchanged, open_unchanged, unreadable
from data_prep.inputs.json_inputs import read_json
from data_prep.inputs.jsonl_inputs import read_lines, skip_line
from data_prep.inputs.records import BYTE_ORDER_MARK, Reading, RecordBatch
from data_prep.inputs.text_inputs import read_document
from data_prep.inputs.units import Segment, Unit

_FIRST_RECORD_BYTES = 1 << 20
_SHOWN_KEYS = 12
_NESTED_KEYS = 3


def read_unit(unit: Unit, reading: Reading) -> Iterator[RecordBatch]:
    """Yield every record of a unit in order, a batch at a time, the bad ones with a reason.

    Raises:
        DataError: A file changed after the job was planned, or a file of records cannot be read.
    """
    for segment in unit.segments:
        fetch(segment.input.path)
        try:
            yield from _read_segment(segment, reading)
            # What was read of a file that was written to meanwhile is part old and part new.
            check_unchanged(segment.input)
        except OSError as error:
            if segment.input.kind != "text":
                raise unreadable(segment.input.path, error) from error
            batch = RecordBatch(segment.file)
            batch.reject(0, f"unreadable: {error.strerror or error}")
            yield batch


class TextReader:
    """Gives the texts of records again, from the offsets that were recorded for them.

    Asked in rising order, the order of records in a shard, a row group of .parquet is decoded once.
    """

    def __init__(self) -> None:
        self._rows_of: tuple[InputFile, Reading] | None = None
        self._rows: Iterator[RecordBatch] = iter(())
        self._batch = RecordBatch(0)

    def read(self, file: InputFile, offset: int, reading: Reading) -> bytes | None:
        """The text of one record.

        Returns:
            Its UTF-8; None when the file is not what it was, or of a kind that is read only from
            its start (.json, .arrow, and all that is compressed).
        """
        if file.codec or file.kind in ("json", "arrow"):
            return None
        try:
            if file.kind == "parquet":
                return self._read_row(file, offset, reading)
            for batch in _read_segment(Segment(0, file, offset, offset + 1), reading):
                if offset in batch.offsets:
                    return batch.texts[batch.offsets.index(offset)]
        except (DataError, OSError):
            return None
        return None

    def _read_row(self, file: InputFile, row: int, reading: Reading) -> bytes | None:
        """A text of .parquet: in the rows at hand, behind them, or in another row group."""
        found = None
        if self._rows_of == (file, reading):
            found = self._search(row)
        if found is None:
            with open_unchanged(file):
                self._rows = read_parquet_row(local_path(file.path), row, reading)
            self._rows_of = file, reading
            self._batch = RecordBatch(0)
            found = self._search(row)
        return found

    def _search(self, row: int) -> bytes | None:
        """A row at hand or behind them in the same row group; None when it is not there."""
        while True:
            offsets = self._batch.offsets
            index = bisect_left(offsets, row)
            if index < len(offsets):
                return self._batch.texts[index] if offsets[index] == row else None
            batch = next(self._rows, None)
            if batch is None:
                return None
            self._batch = batch


def text_keys_of(file: InputFile) -> list[str]:
    """The keys at which the first record of a file of JSON has text, with dots for nested ones."""
    if file.kind not in ("jsonl", "json"):
        return []
    try:
        with open_unchanged(file) as opened:
            content = open_stream(opened, file.codec).read(_FIRST_RECORD_BYTES)
        text = content.removeprefix(BYTE_ORDER_MARK).decode("utf-8", "replace")
        record, _ = json.JSONDecoder().raw_decode(text.lstrip(" \t\r\n["))
    except (DataError, OSError, DamagedInputError, ValueError, RecursionError):
        return []
    return list(itertools.islice(_keys_with_text(record, ""), _SHOWN_KEYS))


def _keys_with_text(value: object, prefix: str) -> Iterator[str]:
    if not isinstance(value, dict) or prefix.count(".") > _NESTED_KEYS:
        return
    for key, inner in value.items():
        if isinstance(inner, str):
            yield f"{prefix}{key}"
        else:
            yield from _keys_with_text(inner, f"{prefix}{key}.")


def _read_segment(segment: Segment, reading: Reading) -> Iterator[RecordBatch]:
    file, number = segment.input, segment.file
    with open_unchanged(file) as opened:
        if file.kind == "parquet":
            path = local_path(file.path)
            yield from read_parquet(path, number, segment.start, segment.end, reading)
        elif file.kind == "arrow":
            if file.bytes:
                yield from read_arrow(local_path(file.path), number, reading)
        elif file.kind == "text":
            yield read_document(open_stream(opened, file.codec), number, reading)
        elif file.kind == "json":
            yield from read_json(open_stream(opened, file.codec), number, reading)
        elif file.codec:
            yield from read_lines(open_stream(opened, file.codec), number, 0, None, reading)
        else:
            start = segment.start
            if start:
                opened.seek(start - 1)
                start += skip_line(opened) - 1
            yield from read_lines(opened, number, start, segment.end, reading)
