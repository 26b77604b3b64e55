"""Read the text column of .parquet (by row groups) and of .arrow (IPC files and streams).

Of records with a form (`data_prep.conversations.forms`) the columns of its keys are read; the path
to "the" column is then empty.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.errors import DataError, shown
from data_prep.inputs.jsonl_inputs import Unusable, text_of
from data_prep.inputs.records import Reading, RecordBatch

PARQUET_MAGIC = b"PAR1"
ARROW_MAGIC = b"ARROW1"
ARROW_FILE_HEADER = b"ARROW1\0\0"
CONTINUATION = b"\xff\xff\xff\xff"
END_OF_STREAM = CONTINUATION + bytes(4)
BATCH_ROWS = 256
READ_BYTES = 1 << 20
BATCH_BYTES = 1 << 21
SHOWN_NAMES = 12
SHOWN_CHARACTERS = 60
SHOWN_REASON = 300

_BYTES_OF = {
    pa.string(): pa.binary(),
    pa.large_string(): pa.large_binary(),
    pa.string_view(): pa.binary_view(),
}


def check_parquet(path: str) -> None:
    """Refuse a .parquet file without its end, before any work is done.

    Raises:
        DataError: It does not begin and end as such a file does.
    """
    with open(path, "rb") as file:
        start, end = _ends(file, len(PARQUET_MAGIC))
    if start != PARQUET_MAGIC or end != PARQUET_MAGIC:
        raise DataError(
            f"{shown(path)} is not a whole .parquet file (no {PARQUET_MAGIC.decode()} at its "
            f"{'start' if start != PARQUET_MAGIC else 'end'}); fetch it again or --exclude it"
        )


def read_parquet(
    path: str, file: int, start: int, end: int, reading: Reading
) -> Iterator[RecordBatch]:
    """Yield the rows of the row groups whose first byte lies in [start, end).

    Offsets of records are row numbers in the file. Rows that cannot be decoded are rejects; the
    other row groups are read all the same.

    Raises:
        DataError: The file has no such column of strings, or its footer is damaged.
    """
    with pa.OSFile(path) as opened, _explained(path):
        parquet = pq.ParquetFile(opened, pre_buffer=False, buffer_size=READ_BYTES)
        column = _find_columns(parquet.schema_arrow, path, reading)
        row = 0
        for number in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(number)
            if start <= _first_byte(group) < end:
                yield from _read_group(parquet, number, column, file, row, reading)
            row += group.num_rows


def read_parquet_row(path: str, row: int, reading: Reading) -> Iterator[RecordBatch]:
    """Yield the rows of the row group that holds row number `row`.

    Raises:
        DataError: As `read_parquet`.
    """
    with pa.OSFile(path) as opened, _explained(path):
        parquet = pq.ParquetFile(opened, pre_buffer=False, buffer_size=READ_BYTES)
        column = _find_columns(parquet.schema_arrow, path, reading)
        first = 0
        for number in range(parquet.num_row_groups):
            last = first + parquet.metadata.row_group(number).num_rows
            if first <= row < last:
                yield from _read_group(parquet, number, column, 0, first, reading)
            first = last


def read_arrow(path: str, file: int, reading: Reading) -> Iterator[RecordBatch]:
    """Yield the rows of an Arrow IPC file or stream; offsets of records are row numbers.

    Both are read front to back: a file is a stream between two magic words. When the end is
    missing, everything before the cut is kept and the cut is one reject.

    Raises:
        DataError: It is neither, or has no such column of strings.
    """
    damage = "" if _is_whole_arrow(path) else "truncated .arrow"
    # Read, not mapped: a mapped file that somebody cuts meanwhile would kill the process.
    with pa.OSFile(path) as opened:
        yield from _read_stream(opened, path, file, damage, reading)


def _read_stream(
    opened: Any, path: str, file: int, damage: str, reading: Reading
) -> Iterator[RecordBatch]:
    """The rows of an open file, then its damage as one reject."""
    with _explained(path):
        if opened.read(len(ARROW_MAGIC)) == ARROW_MAGIC:
            opened.seek(len(ARROW_FILE_HEADER))
        else:
            opened.seek(0)
        stream = pa.ipc.open_stream(opened)
        column = _find_columns(stream.schema, path, reading)
    row = 0
    while True:
        try:
            rows = stream.read_next_batch()
        except StopIteration:
            break
        except (pa.ArrowException, OSError) as error:
            damage = damage or f"damaged .arrow ({_first_line(error)})"
            break
        if fault := _find_fault(rows, column):
            batch = RecordBatch(file)
            batch.reject(row, f"damaged .arrow ({fault})", records=rows.num_rows)
            yield batch
            row += rows.num_rows
            continue
        for piece in _cut(rows):
            yield _take(piece, column, file, row, reading)
            row += piece.num_rows
    if damage:
        batch = RecordBatch(file)
        batch.reject(row, damage)
        yield batch


def _ends(file: BinaryIO, size: int) -> tuple[bytes, bytes]:
    start = file.read(size)
    file.seek(max(0, os.fstat(file.fileno()).st_size - size))
    return start, file.read(size)


def _is_whole_arrow(path: str) -> bool:
    with open(path, "rb") as file:
        start, end = _ends(file, len(END_OF_STREAM))
    if start.startswith(ARROW_MAGIC):
        return end.endswith(ARROW_MAGIC)
    # Before format 0.15 messages had no continuation mark, and neither has the end of a stream.
    return end == END_OF_STREAM if start.startswith(CONTINUATION) else end.endswith(bytes(4))


@contextmanager
def _explained(path: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"cannot read {shown(path)}: {_first_line(error)}; fetch it again or --exclude it"
        ) from error


def _first_byte(group: Any) -> int:
    """Where the first column of a row group begins in the file."""
    column = group.column(0)
    return min(
        int(offset)
        for offset in (column.dictionary_page_offset, column.data_page_offset)
        if offset is not None
    )


def _find_columns(schema: Any, path: str, reading: Reading) -> tuple[str, ...]:
    """The path to the text column; empty when records have a form, whose columns are all there.

    Raises:
        DataError: One is not there, or does not hold text.
    """
    if reading.form is None:
        return _find_column(schema, path, reading)
    found = _form_columns(schema, reading)
    if len(found) < len(reading.form.keys):
        raise DataError(
            f"{shown(path)} lacks a column of {reading.options}; it has {_listed(schema.names)}: "
            "name the columns by these options, or --exclude the file"
        )
    return ()


def _form_columns(schema: Any, reading: Reading) -> list[str]:
    """The columns at the top that hold the keys of a form, as far as they are there once."""
    keys = reading.form.keys if reading.form else ()
    names = [key if key in schema.names else key.partition(".")[0] for key in keys]
    return [name for name in names if schema.names.count(name) == 1]


def _find_column(schema: Any, path: str, reading: Reading) -> tuple[str, ...]:
    """The path to the text column: its literal name, else the names between the dots.

    Raises:
        DataError: There is none, or it does not hold strings.
    """
    key = reading.text_key
    path_in_schema = (key,) if key in schema.names else tuple(key.split("."))
    kind = schema
    for depth, name in enumerate(path_in_schema):
        if depth and not pa.types.is_struct(kind):
            raise DataError(
                f"{shown(path)} has no column {key!r}: {'.'.join(path_in_schema[:depth])!r} is "
                f"{_short(kind)}, which has no parts with names; name the text with --text-key, or "
                "--exclude the file"
            )
        names = [field.name for field in kind]
        if name not in names:
            raise DataError(
                f"{shown(path)} has no column {key!r}; it has {_listed(names)}: name the text with "
                "--text-key, or --exclude the file"
            )
        if names.count(name) > 1:
            raise DataError(
                f"{shown(path)} has {names.count(name)} columns of the name {name!r}; rename all "
                "but one, or --exclude the file"
            )
        kind = kind.field(name).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    is_text = (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_null(kind)
    )
    if not is_text:
        raise DataError(
            f"column {key!r} of {shown(path)} is {_short(kind)}, not text; name the text with "
            "--text-key, or --exclude the file"
        )
    return path_in_schema


def _listed(names: Sequence[str]) -> str:
    """The first names of columns."""
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(_short(name) for name in names[:SHOWN_NAMES]) + more


def _short(value: object) -> str:
    """A name or type in one line of limited length."""
    text = shown(str(value))
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _read_group(
    parquet: Any, number: int, column: tuple[str, ...], file: int, row: int, reading: Reading
) -> Iterator[RecordBatch]:
    """One row group, page by page."""
    end = row + parquet.metadata.row_group(number).num_rows
    try:
        for rows in parquet.iter_batches(
            batch_size=BATCH_ROWS,
            row_groups=[number],
            columns=[".".join(column)] if column else _form_columns(parquet.schema_arrow, reading),
        ):
            for piece in _cut(rows):
                yield _take(piece, column, file, row, reading)
                row += piece.num_rows
        fault = f"it ends {end - row:,} rows before its end" if row < end else ""
    except (pa.ArrowException, OSError) as error:
        fault = _first_line(error)
    if row < end:
        batch = RecordBatch(file)
        batch.reject(row, f"damaged .parquet row group {number} ({fault})", records=end - row)
        yield batch
    assert row <= end, f"row group {number} gave rows up to {row}, its footer says {end}"


def _find_fault(rows: Any, column: tuple[str, ...]) -> str:
    """Why a batch cannot be used; empty when it can.

    Arrow trusts the offsets that it reads; wrong ones would crash the process.
    """
    try:
        rows.validate(full=not column)
        if not column:
            return ""
        array = _descend(rows, column)
        array.validate()
        if pa.types.is_dictionary(array.type):
            array.indices.validate(full=True)
            used = array.indices.drop_null()
            if len(used) and not 0 <= pa.compute.min(used).as_py() <= pa.compute.max(
                used
            ).as_py() < len(array.dictionary):
                return "an index outside of its dictionary"
            array = array.dictionary
        # As bytes: what is not UTF-8 is no fault of the batch but of one row.
        as_bytes = _BYTES_OF.get(array.type)
        (array.view(as_bytes) if as_bytes else array).validate(full=True)
    except pa.ArrowException as error:
        return _first_line(error)
    return ""


def _first_line(error: Exception) -> str:
    return shown((str(error).splitlines() or [type(error).__name__])[0][:SHOWN_REASON])


def _cut(rows: Any) -> Iterator[Any]:
    """Slices of a batch of about two megabytes each, by its mean row."""
    size = max(1, rows.num_rows * BATCH_BYTES // max(rows.nbytes, 1))
    for first in range(0, rows.num_rows, size):
        yield rows.slice(first, size)


def _descend(rows: Any, column: tuple[str, ...]) -> Any:
    """The array at the end of the path; nulls of the structures on it count."""
    array = rows.column(column[0])
    for name in column[1:]:
        array = pa.compute.struct_field(array, name)
    return array


def _take(rows: Any, column: tuple[str, ...], file: int, row: int, reading: Reading) -> RecordBatch:
    """Rows to records: by their column of text, or by their form."""
    if column:
        return _take_rows(_descend(rows, column), file, row, reading)
    batch = RecordBatch(file)
    names = dict.fromkeys(_form_columns(rows.schema, reading))
    for number, record in enumerate(rows.select(list(names)).to_pylist(), row):
        text = text_of(record, reading)
        if isinstance(text, Unusable):
            batch.reject(number, text.reason)
        elif len(text) > reading.max_document_bytes:
            batch.reject(number, reading.too_long, text)
        else:
            batch.add(number, text)
    return batch


def _take_rows(array: Any, file: int, row: int, reading: Reading) -> RecordBatch:
    """Rows to records: nulls, bytes that are not UTF-8 and giants are rejects."""
    batch = RecordBatch(file)
    contents: list[bytes | None] = array.cast(pa.large_binary()).to_pylist()
    if not array.null_count and _is_plain(array, reading):
        batch.texts += contents  # type: ignore[arg-type]  # there are no nulls
        batch.offsets += range(row, row + len(contents))
        return batch
    for number, content in enumerate(contents, row):
        if content is None:
            batch.reject(number, reading.no_string)
        else:
            batch.take(number, content, reading)
    return batch


def _is_plain(array: Any, reading: Reading) -> bool:
    """True when every row is UTF-8 and within the limit."""
    try:
        text = array.cast(pa.large_string())
        text.validate(full=True)
    except pa.ArrowException:
        return False
    longest = int(np.diff(np.frombuffer(text.buffers()[1], np.int64)).max(initial=0))
    return longest <= reading.max_document_bytes
