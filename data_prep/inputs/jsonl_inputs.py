"""Read .jsonl: one JSON object per line, as fast as the parser allows."""

import json
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import orjson

from data_prep.conversations.values import MISSING, FormError, value_at
from data_prep.inputs.codecs import DamagedInputError, Stream
from data_prep.inputs.records import BYTE_ORDER_MARK, Reading, RecordBatch

BLOCK_BYTES = 1 << 20
LEAST_BYTES = 1 << 13


class Unusable(NamedTuple):
    """Why a record gave no text."""

    reason: str


def read_lines(
    stream: Stream, file: int, start: int, end: int | None, reading: Reading
) -> Iterator[RecordBatch]:
    """Yield the records of the lines that start in [start, end), about a megabyte at a time.

    A line that is longer than the limit is passed over without being held. When the stream turns
    out to be damaged, everything before is kept and the fault is one reject.

    Args:
        stream: Bytes from `start` on, which is the beginning of a line.
        file: Number of the file, for the batches.
        start: Offset of the first byte of the stream.
        end: Offset where the next unit begins; None = at the end of the stream.
        reading: Key and limit.
    """
    offset, pieces, held = start, list[bytes](), 0
    damage = ""
    while end is None or offset < end:
        wanted = BLOCK_BYTES if end is None else min(BLOCK_BYTES, max(end - offset, LEAST_BYTES))
        try:
            block = stream.read(wanted)
        except DamagedInputError as error:
            block, damage = b"", str(error)
        cut = block.rfind(b"\n")
        if block and cut < 0:
            pieces.append(block)
            held += len(block)
            if held > reading.max_document_bytes + BLOCK_BYTES:
                batch = RecordBatch(file)
                batch.reject(offset, reading.too_long, pieces[0])
                yield batch
                passed, rest = _skip_line(stream)
                offset, pieces, held = offset + held + passed, [rest], len(rest)
            continue
        data = b"".join([*pieces, block[:cut]]) if block else b"".join(pieces)
        if block or (data and not damage):
            yield _parse_block(data, file, offset, end, reading)
        if not block:
            if damage:
                yield _end_damaged(data, file, offset, damage, reading)
            return
        offset += len(data) + 1
        pieces, held = [block[cut + 1 :]], len(block) - cut - 1


def skip_line(file: BinaryIO) -> int:
    """Skip past the next line end without holding the line; return the bytes skipped."""
    passed = 0
    while part := file.readline(BLOCK_BYTES):
        passed += len(part)
        if part.endswith(b"\n"):
            break
    return passed


def parse_record(content: bytes, reading: Reading) -> bytes | Unusable:
    """One JSON object to its text in UTF-8; blank content is an empty record."""
    content = content.removeprefix(BYTE_ORDER_MARK)
    if not content.strip():
        return b""
    if len(content) > reading.max_document_bytes:
        return Unusable(reading.too_long)
    try:
        value = orjson.loads(content)
    except orjson.JSONDecodeError:
        value = _parse_leniently(content)
    if isinstance(value, Unusable):
        return value
    return text_of(value, reading)


def text_of(value: object, reading: Reading) -> bytes | Unusable:
    """The text of a parsed record: at the literal key, else below the keys between the dots."""
    if not isinstance(value, dict):
        return Unusable("not a JSON object")
    if reading.form is not None:
        try:
            return reading.form.document(value)
        except FormError as error:
            return Unusable(str(error))
    text = value_at(value, reading.text_key)
    if text is MISSING:
        return Unusable(reading.missing)
    if not isinstance(text, str):
        return Unusable(reading.no_string)
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return Unusable("lone surrogate")


def add_record(batch: RecordBatch, offset: int, content: bytes, reading: Reading) -> None:
    """Parse one record that is not plainly good, and put it or its reject into the batch.

    A raw carriage return is not allowed in a JSON string, so a bad line that holds some may be
    several with old line ends: when one of the parts is good, each is a record.
    """
    parsed = parse_record(content, reading)
    if not isinstance(parsed, Unusable):
        batch.add(offset, parsed)
        return
    parts = content.rstrip(b"\r").split(b"\r")
    texts = [parse_record(part, reading) for part in parts]
    if not any(isinstance(text, bytes) and text for text in texts):
        batch.reject(offset, parsed.reason, content)
        return
    for part, text in zip(parts, texts, strict=True):
        if isinstance(text, Unusable):
            batch.reject(offset, text.reason, part)
        else:
            batch.add(offset, text)
        offset += len(part) + 1


def _parse_block(
    data: bytes, file: int, offset: int, end: int | None, reading: Reading
) -> RecordBatch:
    """The records of whole lines; the loop that the speed of .jsonl depends on."""
    batch = RecordBatch(file)
    # Of a record with a form no key gives the text: each goes through `add_record`.
    key, loads = reading.text_key if reading.form is None else None, orjson.loads
    add_text, add_offset = batch.texts.append, batch.offsets.append
    may_be_long = len(data) > reading.max_document_bytes
    stop = offset + len(data) + 1 if end is None else end
    for line in data.split(b"\n"):
        if offset >= stop:
            break
        if may_be_long and len(line) > reading.max_document_bytes:
            batch.reject(offset, reading.too_long, line)
        else:
            try:
                text = loads(line)[key].encode()
            except (ValueError, LookupError, TypeError, AttributeError):
                add_record(batch, offset, line, reading)
            else:
                add_text(text)
                add_offset(offset)
        offset += len(line) + 1
    return batch


def _end_damaged(rest: bytes, file: int, offset: int, damage: str, reading: Reading) -> RecordBatch:
    """What is left before the damage: a whole record is kept, and the damage is one reject."""
    batch = RecordBatch(file)
    parsed = parse_record(rest, reading) if rest.strip() else b""
    if isinstance(parsed, bytes) and parsed:
        batch.add(offset, parsed)
        offset, rest = offset + len(rest), b""
    batch.reject(offset, damage, rest)
    return batch


def _skip_line(stream: Stream) -> tuple[int, bytes]:
    """Skip the rest of a line: the bytes skipped, and what was read after its end."""
    passed = 0
    while True:
        try:
            block = stream.read(BLOCK_BYTES)
        except DamagedInputError:
            return passed, b""  # the next read reports it again
        cut = block.find(b"\n")
        if cut >= 0:
            return passed + cut + 1, block[cut + 1 :]
        passed += len(block)
        if not block:
            return passed, b""


def _parse_leniently(content: bytes) -> object:
    """What the fast parser refuses may still hold a good text: huge numbers, NaN, other fields."""
    try:
        # Numbers are not looked at, and of the longest no integer can be made.
        return json.loads(content.decode("utf-8"), parse_int=float)
    except UnicodeDecodeError:
        return Unusable("not UTF-8")
    except ValueError:
        return Unusable("malformed JSON")
    except RecursionError:
        return Unusable("JSON that is nested too deep")
