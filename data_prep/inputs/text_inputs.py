"""Read a text or source code file: the whole file is one document."""

from data_prep.inputs.codecs import DamagedInputError, Stream
from data_prep.inputs.records import BYTE_ORDER_MARK, Reading, RecordBatch

BLOCK_BYTES = 1 << 20


def read_document(stream: Stream, file: int, reading: Reading) -> RecordBatch:
    """The content of a stream as one record, without a byte order mark.

    What is longer than the limit, binary, not UTF-8 or cut short is a reject.
    """
    batch = RecordBatch(file)
    if reading.form is not None:
        batch.reject(0, f"a text file has no keys ({reading.options})")
        return batch
    pieces: list[bytes] = []
    held = 0
    try:
        while held <= reading.max_document_bytes and (block := stream.read(BLOCK_BYTES)):
            pieces.append(block)
            held += len(block)
    except DamagedInputError as error:
        batch.reject(0, str(error), b"".join(pieces))
        return batch
    content = b"".join(pieces).removeprefix(BYTE_ORDER_MARK)
    if b"\0" in content and held <= reading.max_document_bytes:
        batch.reject(0, "binary", content)
    else:
        batch.take(0, content, reading)
    return batch
