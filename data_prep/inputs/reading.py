"""Units of work to records: each kind of input by its reader."""

from collections.abc import Iterator

from data_prep.errors import DataError
from data_prep.inputs.arrow_inputs import read_arrow, read_parquet, read_parquet_row
from data_prep.inputs.codecs import open_stream
from data_prep.inputs.hub_dataset import fetch, local_path
from data_prep.inputs.json_inputs import read_json
from data_prep.inputs.jsonl_inputs import read_lines, skip_line
from data_prep.inputs.records import Reading, RecordBatch
from data_prep.inputs.sources import InputFile, Segment, Unit, open_unchanged, unreadable
from data_prep.inputs.text_inputs import read_document


def read_unit(unit: Unit, reading: Reading) -> Iterator[RecordBatch]:
    """Yield every record of a unit in order, a batch at a time, the bad ones with a reason.

    Raises:
        DataError: A file changed after the job was planned, or a file of records cannot be read.
    """
    for segment in unit.segments:
        fetch(segment.source.path)
        try:
            yield from _read_segment(segment, reading)
        except OSError as error:
            if segment.source.kind != "text":
                raise unreadable(segment.source.path, error) from error
            batch = RecordBatch(segment.file)
            batch.reject(0, f"unreadable: {error.strerror or error}")
            yield batch


def read_text(source: InputFile, offset: int, reading: Reading) -> bytes | None:
    """The text of one record again, from the offset that was recorded for it.

    Returns:
        Its UTF-8; None when the file is not what it was, or of a kind that is read only from its
        start (.json, .arrow, and all that is compressed).
    """
    if source.codec or source.kind in ("json", "arrow"):
        return None
    try:
        if source.kind == "parquet":
            with open_unchanged(source):
                batches = read_parquet_row(local_path(source.path), offset, reading)
        else:
            batches = _read_segment(Segment(0, source, offset, offset + 1), reading)
        for batch in batches:
            if offset in batch.offsets:
                return batch.texts[batch.offsets.index(offset)]
    except (DataError, OSError):
        return None
    return None


def _read_segment(segment: Segment, reading: Reading) -> Iterator[RecordBatch]:
    source, number = segment.source, segment.file
    with open_unchanged(source) as file:
        if source.kind == "parquet":
            path = local_path(source.path)
            yield from read_parquet(path, number, segment.start, segment.end, reading)
        elif source.kind == "arrow":
            if source.bytes:
                yield from read_arrow(local_path(source.path), number, reading)
        elif source.kind == "text":
            yield read_document(open_stream(file, source.codec), number, reading)
        elif source.kind == "json":
            yield from read_json(open_stream(file, source.codec), number, reading)
        elif source.codec:
            yield from read_lines(open_stream(file, source.codec), number, 0, None, reading)
        else:
            start = segment.start
            if start:
                file.seek(start - 1)
                start += skip_line(file) - 1
            yield from read_lines(file, number, start, segment.end, reading)
