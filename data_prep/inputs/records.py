"""What the readers yield: the records of one file, a batch at a time."""

from dataclasses import dataclass, field
from typing import NamedTuple

from data_prep.conversations.forms import RecordForm
from data_prep.conversations.values import key_faults

SAMPLE_CHARACTERS = 80
LARGEST_DOCUMENT_BYTES = 1 << 26
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Reading(NamedTuple):
    """How records are read: the key of the text, and the size above which one is rejected.

    A key with dots names a nested value (`meta.text`), unless a record has that very key. With a
    form the text is what that makes of a record, marked (`data_prep.conversations.marks`).
    """

    text_key: str
    max_document_bytes: int = LARGEST_DOCUMENT_BYTES
    form: RecordForm | None = None

    @property
    def too_long(self) -> str:
        """The reason of a reject above the limit."""
        return f"longer than --max-document-bytes {self.max_document_bytes}"

    @property
    def missing(self) -> str:
        """The reason of a reject without the key."""
        return key_faults(self.text_key)[0]

    @property
    def no_string(self) -> str:
        """The reason of a reject whose text is null, a number, or anything else."""
        return key_faults(self.text_key)[1]

    @property
    def key_faults(self) -> tuple[str, ...]:
        """The reasons of rejects that lack a key, or hold something else there."""
        return (self.missing, self.no_string) if self.form is None else self.form.key_faults

    @property
    def options(self) -> str:
        """The options that name the keys, for messages."""
        return f"--text-key {self.text_key}" if self.form is None else self.form.options


class Reject(NamedTuple):
    """A record that gave no text.

    `offset` is where it starts in its file (see `RecordBatch`), `sample` the start of it, and
    `records` how many there are when a fault took several at once.
    """

    offset: int
    reason: str
    sample: str = ""
    records: int = 1


@dataclass(slots=True)
class RecordBatch:
    """Consecutive records of one input file, in order.

    Attributes:
        file: Number of the file.
        texts: UTF-8 of each text; an empty record is empty.
        offsets: Of each text, where its record starts: the byte in the (decompressed) file, or
            the row number of .parquet and .arrow.
        rejects: The records between them that gave no text.
    """

    file: int
    texts: list[bytes] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)

    def add(self, offset: int, text: bytes) -> None:
        """Append a record with a text."""
        self.texts.append(text)
        self.offsets.append(offset)

    def reject(self, offset: int, reason: str, content: bytes = b"", records: int = 1) -> None:
        """Append a record without one."""
        self.rejects.append(Reject(offset, reason, sample(content), records))

    def take(self, offset: int, text: bytes, reading: Reading) -> None:
        """Append a text of a file format that holds plain strings, if it is UTF-8."""
        if len(text) > reading.max_document_bytes:
            self.reject(offset, reading.too_long, text)
        elif is_utf8(text):
            self.add(offset, text)
        else:
            self.reject(offset, "not UTF-8", text)


def is_utf8(content: bytes) -> bool:
    """True when `content` decodes."""
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def sample(content: bytes) -> str:
    """The start of a record, for the list of rejects."""
    return content[: 4 * SAMPLE_CHARACTERS].decode("utf-8", "replace")[:SAMPLE_CHARACTERS]
