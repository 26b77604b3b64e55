"""Units of work to records: each kind of input by its reader."""

from collections.abc import Iterator

from data_prep.errors import DataError
from data_prep.inputs.arrow_inputs import read_arrow, read_parquet, read_parquet_row
from data_prep.inputs.codecs import open_stream
from data_prep.inputs.hub_dataset import fetch, local_path
from data_prep.inputs.input_files import InputFile, check_unchanged, open_unchanged, unreadable
from data_prep.inputs.json_inputs import read_json
from data_prep.inputs.jsonl_inputs import read_lines, skip_line
from data_prep.inputs.records import Reading, RecordBatch
from data_prep.inputs.text_inputs import read_document
from data_prep.inputs.units import Segment, Unit


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


def read_text(file: InputFile, offset: int, reading: Reading) -> bytes | None:
    """The text of one record again, from the offset that was recorded for it.

    Returns:
        Its UTF-8; None when the file is not what it was, or of a kind that is read only from its
        start (.json, .arrow, and all that is compressed).
    """
    if file.codec or file.kind in ("json", "arrow"):
        return None
    try:
        if file.kind == "parquet":
            with open_unchanged(file):
                batches = read_parquet_row(local_path(file.path), offset, reading)
        else:
            batches = _read_segment(Segment(0, file, offset, offset + 1), reading)
        for batch in batches:
            if offset in batch.offsets:
                return batch.texts[batch.offsets.index(offset)]
    except (DataError, OSError):
        return None
    return None


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
