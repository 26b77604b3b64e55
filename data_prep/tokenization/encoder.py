"""Texts to ids with the fastest library that gives the ids of `tokenizers`.

`gigatoken` is many times faster, but knows only some split patterns, so it is compared with
`tokenizers` before the first document (see `encoder_probe`) and on a sample of the documents.
Which of the two encodes never changes a byte of the output.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import orjson
import xxhash
from numpy.typing import NDArray

from data_prep.errors import DataError
from data_prep.tokenization.encoder_probe import mark_texts, probe_texts
from data_prep.tokenization.tokenizer import TokenArray, Tokenizer
from data_prep.tokenization.unicode_versions import asks_for_marks, is_disputed

EncoderChoice = Literal["auto", "gigatoken", "tokenizers"]
EncoderName = Literal["bytes", "gigatoken", "tokenizers"]

SAMPLED_ONE_IN = 1024
LARGEST_REENCODED_BYTES = 1 << 16
LARGEST_DECODED_BYTES = 1 << 20
CACHE_GROWTH_BYTES = 48 << 20
SHOWN_CHARACTERS = 60


class EncoderReport(NamedTuple):
    """The encoder that a job uses, and a note to the user about the choice; may be empty."""

    name: EncoderName
    note: str


class Encoder:
    """Encodes documents and appends EOS to each.

    Args:
        tokenizer: Whose ids to give.
        name: The library that encodes.

    Attributes:
        dtype: Of the ids it gives.
        eos_id: The id that ends each document.
        sampled: Documents so far that were decoded again to see whether their text comes back;
            only counted when the tokenizer does not promise that it does.
        altered: Those of them whose text did not.
    """

    def __init__(self, tokenizer: Tokenizer, name: EncoderName) -> None:
        self._tokenizer = tokenizer
        self._name = name
        self._fast = _Gigatoken(tokenizer) if name == "gigatoken" else None
        self.dtype = tokenizer.dtype
        self.eos_id = tokenizer.eos_id
        self.sampled = self.altered = 0

    def encode(self, texts: Sequence[bytes]) -> tuple[TokenArray, NDArray[np.int64]]:
        """Encode documents given as UTF-8.

        Returns:
            All ids one after the other, and the length of each document with its EOS. Example
            with bytes: [b"ab", b"c"] gives [97, 98, 256, 99, 256] and [3, 2].

        Raises:
            DataError: The library gave an id that the tokenizer does not have, or ended a document
                inside of its text, or gave a document of the sample other ids than `tokenizers`
                does, or ids that do not decode to it although the tokenizer promises it.
        """
        ids, ends = self.encode_plain(texts)
        return _append_eos(ids, ends, self.eos_id, self.dtype)

    def encode_plain(self, texts: Sequence[bytes]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Encode texts given as UTF-8, without EOS.

        Returns:
            All ids one after the other, and the position where each text ends. Example with bytes:
            [b"ab", b"c"] gives [97, 98, 99] and [2, 3].

        Raises:
            DataError: As `encode`.
        """
        if self._name == "bytes":
            ids: NDArray[Any] = np.frombuffer(b"".join(texts), np.uint8)
            ends = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)))
        elif self._fast is not None:
            ids, ends = self._fast.encode(texts)
        else:
            ids, ends = self._tokenizer.encode_plain([text.decode() for text in texts])
        if len(ids) and int(ids.max()) > self._tokenizer.max_token_id:
            raise DataError(
                f"{self._name} gave the id {int(ids.max())}, above the largest id of the "
                f"tokenizer, {self._tokenizer.max_token_id}; use --encoder tokenizers"
            )
        self._check_ends(texts, ids, ends)
        self._check_sample(texts, ids, ends)
        return ids, ends

    def id_of(self, special_name: bytes) -> int:
        """The id of a special token."""
        return self._tokenizer.special_id(special_name.decode())

    def _check_ends(
        self, texts: Sequence[bytes], ids: NDArray[Any], ends: NDArray[np.int64]
    ) -> None:
        """See that no text became the end-of-document token, unless that was asked for."""
        if self._tokenizer.special_tokens == "id":
            return
        found = np.flatnonzero(ids == self._tokenizer.eos_id)
        if len(found):
            number = int(np.searchsorted(ends, found[0], side="right"))
            raise DataError(
                f"the tokenizer encodes text of {_shown(texts[number].decode())} as its "
                f"end-of-document token {self._tokenizer.eos_token!r}; leave the document out, or "
                "name another --eos-token"
            )

    def _check_sample(
        self, texts: Sequence[bytes], ids: NDArray[Any], ends: NDArray[np.int64]
    ) -> None:
        """Compare about one document in a thousand, chosen by its text, with `tokenizers`."""
        for number, text in enumerate(texts):
            if xxhash.xxh3_64_intdigest(text) % SAMPLED_ONE_IN or len(text) > LARGEST_DECODED_BYTES:
                continue
            start = int(ends[number - 1]) if number else 0
            self._check_document(text.decode(), ids[start : ends[number]])

    def _check_document(self, text: str, ids: NDArray[Any]) -> None:
        """Compare the ids of a document, and its text with what they decode to."""
        # The library that defines the ids is slow: one long document would take as long as a
        # megabyte of others, so of those only the decoded text is compared.
        if self._name != "tokenizers" and len(text) <= LARGEST_REENCODED_BYTES:
            expected, _ = self._tokenizer.encode_plain([text])
            if not np.array_equal(expected, ids):
                raise DataError(
                    f"{self._name} and tokenizers disagree on a document: other ids for "
                    f"{_shown(text)}; delete the output and run again with --encoder tokenizers"
                )
        is_same = self._tokenizer.decode(ids) == text
        if self._tokenizer.why_lossy:
            self.sampled += 1
            self.altered += not is_same
        elif not is_same:
            raise DataError(
                f"the ids that {self._name} gives for {_shown(text)} do not decode to it, although "
                "this kind of tokenizer loses nothing; try --encoder tokenizers, or another "
                "tokenizer"
            )


def choose_encoder(tokenizer: Tokenizer, choice: EncoderChoice) -> EncoderReport:
    """Find the fastest encoder that gives the ids of `tokenizers`, by trying.

    Args:
        tokenizer: Whose ids are wanted.
        choice: What the user asked for; "auto" takes gigatoken when it gives the same ids.

    Raises:
        DataError: gigatoken was asked for by name and cannot be used.
    """
    if tokenizer.is_bytes and tokenizer.special_tokens != "id":
        return EncoderReport("bytes", "")
    if choice == "tokenizers":
        return EncoderReport("tokenizers", "")
    reason = _why_not_gigatoken(tokenizer)
    if not reason:
        return EncoderReport("gigatoken", "")
    if choice == "gigatoken":
        raise DataError(f"--encoder gigatoken: {reason}; use --encoder auto")
    return EncoderReport("tokenizers", f"encoding with tokenizers, many times slower: {reason}")


def _why_not_gigatoken(tokenizer: Tokenizer) -> str:
    """Why gigatoken cannot encode for this tokenizer; empty when it can."""
    texts = probe_texts((*tokenizer.special_names, *tokenizer.found_names))
    if asks_for_marks(orjson.loads(tokenizer.content)):
        texts += mark_texts()
    try:
        ids, ends = _Gigatoken(tokenizer).encode([text.encode() for text in texts])
    except ImportError as error:
        return f"gigatoken cannot be imported ({error})"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in its native code is not an Exception
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return f"gigatoken does not support this tokenizer ({reason[:200]})"
    expected, expected_ends = tokenizer.encode_plain(texts)
    if np.array_equal(ids, expected) and np.array_equal(ends, expected_ends):
        return ""
    start = 0
    for text, end, expected_end in zip(texts, ends, expected_ends, strict=True):
        if end != expected_end or not np.array_equal(ids[start:end], expected[start:end]):
            return f"gigatoken gives other ids for {_shown(text)}"
        start = int(end)
    raise AssertionError("the ids differ, but not for any text")


def _shown(text: str) -> str:
    """The start of a document, for messages."""
    return repr(text[:SHOWN_CHARACTERS])


def _append_eos(
    ids: NDArray[Any], ends: NDArray[np.int64], eos_id: int, dtype: np.dtype[Any]
) -> tuple[TokenArray, NDArray[np.int64]]:
    """Put EOS after each document: ids [5, 6, 7], ends [2, 3] give [5, 6, E, 7, E], [3, 2]."""
    positions = ends + np.arange(len(ends))
    is_text = np.ones(len(ids) + len(ends), dtype=bool)
    is_text[positions] = False
    flat: TokenArray = np.empty(len(is_text), dtype=dtype)
    flat[is_text] = ids
    flat[positions] = eos_id
    return flat, np.diff(ends, prepend=0) + 1


class _Gigatoken:
    """The fast library, with the options of a tokenizer.

    Its cache of words grows with every new one, so it is loaded again when it took much memory.
    Documents with characters that it may take differently are encoded by `tokenizers`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        layout = orjson.loads(tokenizer.content)
        layout |= {"post_processor": None, "truncation": None, "padding": None}
        if tokenizer.special_tokens != "id":
            # It has no option to encode their text as plain text, but does so when they are absent.
            special = tokenizer.special_names
            layout["added_tokens"] = [
                token
                for token in layout.get("added_tokens") or []
                if token["content"] not in special
            ]
        self._layout = orjson.dumps(layout)
        self._with_marks = asks_for_marks(layout)
        self._grown = 0
        self._backend = self._load()

    def encode(self, texts: Sequence[bytes]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Ids of all texts, and the position where each ends."""
        ids, ends = self._encode_all(texts)
        disputed = {
            number for number, text in enumerate(texts) if is_disputed(text, self._with_marks)
        }
        if not disputed:
            return ids, ends
        pieces: list[NDArray[Any]] = np.split(ids, ends[:-1])
        for number in disputed:
            pieces[number] = self._tokenizer.encode_plain([texts[number].decode()])[0]
        return np.concatenate(pieces), np.cumsum([len(piece) for piece in pieces])

    def _encode_all(self, texts: Sequence[bytes]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        before = _resident_bytes()
        encoded = self._backend.encode_batch(list(texts), parallel=False).layout
        ids, offsets = np.asarray(encoded.content.data), np.asarray(encoded.offsets.data)
        self._grown += max(0, _resident_bytes() - before - ids.nbytes)
        if self._grown > CACHE_GROWTH_BYTES:
            self._backend = self._load()
            self._grown = 0
        return ids, offsets[1:]

    def _load(self) -> Any:
        import gigatoken

        return gigatoken.Tokenizer.from_json(self._layout)


def _resident_bytes() -> int:
    """Memory of this process; 0 where the system does not report it."""
    try:
        fields = Path("/proc/self/statm").read_bytes().split()
    except OSError:
        return 0
    return int(fields[1]) * 4096
