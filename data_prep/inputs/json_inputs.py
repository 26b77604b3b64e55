"""Read .json as a stream: an array of objects or strings, one object, or objects in a row.

The values are found by their brackets and quotes alone and parsed one by one, so a file of any
size is read in bounded memory, and a value that is malformed costs no other as long as its
brackets still match. Where they do not, the value is one reject and reading goes on at the next
line that begins like it (same indent, an object); without such a line the rest of the file is
part of the reject.
"""

# ijson was tried instead (3.6, yajl2_c): it stops at the first fault, so of 20 good records around
# a malformed one it gives the 10 before it (all 20 here), and it tells no byte offset of a value.
# Where nothing is malformed it is faster: 273 MB/s of CPU time against 32 on records of 500 bytes.

import re
from collections.abc import Iterator

import orjson

from data_prep.inputs.codecs import DamagedInputError, Stream
from data_prep.inputs.jsonl_inputs import Unusable, parse_record, read_lines
from data_prep.inputs.records import BYTE_ORDER_MARK, Reading, RecordBatch

BLOCK_BYTES = 1 << 20
LOOK_BEHIND_BYTES = 256
LARGEST_INDENT = 64
LONGEST_STRAY = 1024
QUOTE = ord('"')

# A string up to its closing quote, or up to the line end or block end that comes first.
_TOKEN = re.compile(rb'"[^"\\\n]*(?:\\.[^"\\\n]*)*("?)|[\[\]{}]', re.DOTALL)
_STRING_REST = re.compile(rb'[^"\\\n]*(?:\\.[^"\\\n]*)*("?)', re.DOTALL)
_BETWEEN = re.compile(rb"[^\s,]+")
_CLOSES = {ord("}"): ord("{"), ord("]"): ord("[")}
MALFORMED = "malformed JSON"
NEVER = re.compile(rb"(?!)")


def read_json(stream: Stream, file: int, reading: Reading) -> Iterator[RecordBatch]:
    """Yield the records of a .json file, the objects and strings at its top or in its array.

    A file whose first line is a whole object is read line by line, like .jsonl.
    """
    first = _Prefetched(stream)
    if starts_like_jsonl(first.peek()):
        yield from read_lines(first, file, 0, None, reading)
        return
    scanner = _Scanner(file, reading)
    damage = ""
    while True:
        try:
            block = first.read(BLOCK_BYTES)
        except DamagedInputError as error:
            block, damage = b"", str(error)
        if not block:
            break
        yield scanner.feed(block)
    yield scanner.finish(damage)


def starts_like_jsonl(content: bytes) -> bool:
    """True when the first line is a JSON object of its own and others follow."""
    line, line_end, _ = content.removeprefix(BYTE_ORDER_MARK).partition(b"\n")
    if not line_end or not line.lstrip().startswith(b"{"):
        return False
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return True


class _Prefetched:
    """A stream whose first block was looked at."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._first = b""

    def peek(self) -> bytes:
        """The first block, which `read` gives again; nothing when even that is damaged."""
        try:
            self._first = self._stream.read(BLOCK_BYTES)
        except DamagedInputError:
            self._first = b""
        return self._first

    def read(self, size: int, /) -> bytes:
        """The next bytes."""
        block, self._first = self._first, b""
        return block or self._stream.read(size)


class _Scanner:
    """Cuts a stream of JSON into values, holding no more than one of them.

    Attributes of the value that is open: `_start` its offset (None = between values), `_pieces`
    its bytes so far, `_open` its brackets that are not closed, `_indent` the blanks before it when
    it begins a line (None when it does not).
    """

    def __init__(self, file: int, reading: Reading) -> None:
        self._file = file
        self._reading = reading
        self._batch = RecordBatch(file)
        self._in_array = False
        self._start: int | None = None
        self._pieces: list[bytes] = []
        self._held = 0
        self._open = bytearray()
        self._in_string = False
        self._indent: bytes | None = None
        self._resume: re.Pattern[bytes] | None = None
        self._base = 0
        self._behind = b""
        self._carry = b""

    def feed(self, block: bytes, is_last: bool = False) -> RecordBatch:
        """Take the next bytes; give the records that ended in them."""
        content = self._carry + block
        place, was = 0, -1
        while place < len(content) and place != was:
            if self._resume is not None:
                was, place = place, self._find_again(content, place, is_last)
            elif self._start is None:
                was, place = place, self._scan_between(content, place, is_last)
                was = -1 if self._start is not None else was
            else:
                was, place = place, self._scan_value(content, place, is_last)
        self._carry = content[place:]
        self._behind = (self._behind + content[:place])[-LOOK_BEHIND_BYTES:]
        self._base += place
        batch, self._batch = self._batch, RecordBatch(self._file)
        return batch

    def finish(self, damage: str) -> RecordBatch:
        """The end of the stream: what is still open is a reject, and so is damage."""
        self._batch = self.feed(b"", is_last=True)
        if damage:
            start = self._base if self._start is None else self._start
            self._batch.reject(start, damage, b"".join(self._pieces))
        elif self._start is not None:
            self._give_up(MALFORMED)
        elif self._in_array and self._resume is None:
            self._batch.reject(self._base, f"{MALFORMED}: the array has no end")
        return self._batch

    def _scan_between(self, content: bytes, place: int, is_last: bool) -> int:
        """From a place between values to the start of the next one."""
        found = _TOKEN.search(content, place)
        until = found.start() if found else len(content)
        for stray in _BETWEEN.finditer(content, place, until):
            if stray.end() == len(content) and not is_last and len(stray.group()) < LONGEST_STRAY:
                return stray.start()  # it may go on
            if stray.group() != BYTE_ORDER_MARK:
                self._batch.reject(self._base + stray.start(), "not a JSON object", stray.group())
        if found is None:
            return until
        sign = content[until]
        if sign == ord("[") and not self._in_array:
            self._in_array = True
        elif sign == ord("]") and self._in_array:
            self._in_array = False
        elif sign in _CLOSES:
            self._batch.reject(self._base + until, MALFORMED, content[until:])
        else:
            self._start = self._base + until
            self._indent = self._indent_before(content, until)
            return until
        return until + 1

    def _scan_value(self, content: bytes, first: int, is_last: bool) -> int:
        """From a place in a value to its end, to a fault, or to the end of what is there."""
        place = first
        while place == first or self._open or self._in_string:
            found = (_STRING_REST if self._in_string else _TOKEN).search(content, place)
            if found is None:
                return self._hold(content, first, len(content))
            place, sign = found.end(), content[found.start()] if not self._in_string else QUOTE
            if sign == QUOTE:
                self._in_string = not found.group(1)
                if self._in_string:
                    return self._pause_string(content, first, place, is_last)
            elif sign in _CLOSES:
                if not self._open or self._open.pop() != _CLOSES[sign]:
                    return self._lose(content, first, place)
            elif self._is_out_of_place(content, found.start()):
                # An object where a key must be: the one before was never closed.
                place = self._hold(content, first, found.start())
                self._give_up(MALFORMED)
                return place
            else:
                self._open.append(sign)
        return self._close(content, first, place)

    def _pause_string(self, content: bytes, first: int, place: int, is_last: bool) -> int:
        """A string is not closed: the bytes end inside it, or a raw line end does not let it."""
        if content[place : place + 1] == b"\n" or (is_last and place < len(content)):
            return self._lose(content, first, place)
        return self._hold(content, first, place)

    def _is_out_of_place(self, content: bytes, place: int) -> bool:
        """True for a bracket directly in an object that does not follow a colon."""
        if not self._open or self._open[-1] != ord("{"):
            return False
        before = self._before(content, place).rstrip()
        return bool(before) and not before.endswith(b":")

    def _hold(self, content: bytes, first: int, place: int) -> int:
        """Keep the bytes of the open value; of a giant one only the start."""
        if self._held <= self._reading.max_document_bytes:
            self._pieces.append(content[first:place])
        self._held += place - first
        return place

    def _close(self, content: bytes, first: int, place: int) -> int:
        """The open value ends at `place`: parse it."""
        self._hold(content, first, place)
        assert self._start is not None, "a value is open"
        if self._held > self._reading.max_document_bytes:
            self._give_up(self._reading.too_long)
            return place
        value = b"".join(self._pieces)
        is_text = value[0] == QUOTE and self._reading.form is None
        parsed = _parse_string(value) if is_text else parse_record(value, self._reading)
        if isinstance(parsed, Unusable):
            self._give_up(parsed.reason)
        else:
            self._batch.add(self._start, parsed)
            self._forget()
        return place

    def _lose(self, content: bytes, first: int, place: int) -> int:
        """A fault that hides where the value ends: look for a line that begins like its first."""
        self._hold(content, first, place)
        self._give_up(MALFORMED)
        indent = self._indent
        self._resume = NEVER if indent is None else re.compile(rb"\n" + indent + rb"(?=\{)")
        return place

    def _give_up(self, reason: str) -> None:
        """The open value is a reject."""
        assert self._start is not None, "a value is open"
        self._batch.reject(self._start, reason, b"".join(self._pieces))
        self._forget()

    def _forget(self) -> None:
        self._start, self._pieces, self._held, self._in_string = None, [], 0, False
        self._open.clear()

    def _find_again(self, content: bytes, place: int, is_last: bool) -> int:
        """The place behind the blanks of the next line that begins as the lost value did."""
        assert self._resume is not None, "looking for the next value"
        found = self._resume.search(content, place)
        if found:
            self._resume = None
            return found.end()
        line = content.rfind(b"\n", place)
        is_near = line >= 0 and len(content) - line <= LARGEST_INDENT + 1
        return line if is_near and not is_last else len(content)

    def _indent_before(self, content: bytes, place: int) -> bytes | None:
        before = self._before(content, place)
        line = before.rstrip(b" \t")
        blanks = before[len(line) :]
        is_first = self._base + place == len(blanks)
        starts_line = line.endswith(b"\n") or is_first
        return blanks if starts_line and len(blanks) <= LARGEST_INDENT else None

    def _before(self, content: bytes, place: int) -> bytes:
        """The last bytes before a place."""
        near = content[max(0, place - LOOK_BEHIND_BYTES) : place]
        return (self._behind + near)[-LOOK_BEHIND_BYTES:]


def _parse_string(content: bytes) -> bytes | Unusable:
    """A plain string in an array is a document of its own."""
    try:
        text = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        return Unusable("lone surrogate" if "surrogate" in str(error) else MALFORMED)
    assert isinstance(text, str), type(text)
    return text.encode()
