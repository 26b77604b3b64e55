"""Text to token ids and back: a tokenizer.json from a file, trained on the input, or bytes."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson
import tokenizers
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from data_prep.errors import DataError, shown

TokenArray = NDArray[Any]  # uint16 or uint32
SpecialTokens = Literal["text", "id", "reject"]

END_OF_TEXT = "<|endoftext|>"
USUAL_EOS_NAMES = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>")
NUM_BYTES = 256
PART_CHARACTERS = 1 << 20
LINE_BEFORE_LETTER = re.compile(r"\n(?=[A-Za-z])")
SMALLEST_TRAINED_VOCABULARY = NUM_BYTES + 1

# Words with one leading sign or space, numbers of up to three digits, runs of signs, line ends.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """A tokenizer.json with what a shard set needs to know about it.

    Nothing is added to a text but EOS, once at the end of each document.

    Attributes:
        content: The bytes of its tokenizer.json, as given.
        sha256: Of the content.
        vocab_size: Number of tokens, added ones included.
        max_token_id: The largest id it can give.
        eos_token: Name of the end-of-document token.
        eos_id: Its id.
        dtype: How ids are stored: uint16 when all fit, else uint32.
        is_bytes: True for the tokenizer of plain bytes.
        why_lossy: Why decode(encode(text)) may be another text; empty when it is the same.
        special_tokens: What to do with text that spells a special token: "text" encodes it as
            ordinary text, "id" as the token, "reject" refuses the document.
        special_names: The texts of the special tokens, that of the end of a document among them.
        found_names: The texts that are made tokens wherever they occur.

    Args:
        content: The bytes of a tokenizer.json.
        eos_token: Name of the end-of-document token; None = the first usual name it has.
        origin: Where the content came from, for messages.
        special_tokens: As the attribute.

    Raises:
        DataError: Not a tokenizer.json, or no end-of-document token.
    """

    def __init__(
        self,
        content: bytes,
        eos_token: str | None,
        origin: str,
        special_tokens: SpecialTokens = "text",
    ) -> None:
        try:
            self._backend = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises bare Exception
            raise DataError(
                f"--tokenizer {origin} is not a Hugging Face tokenizer.json ({error})"
            ) from error
        self.eos_token, self.eos_id = self._find_eos(eos_token, origin)
        added = self._backend.get_added_tokens_decoder()
        if self.eos_id in added and not added[self.eos_id].special:
            # Some files forget to call it special: text that spells it would end a document.
            self._backend.add_special_tokens([AddedToken(self.eos_token, special=True)])
            added = self._backend.get_added_tokens_decoder()
        # The library's flag says "encode them as text", not "recognize them".
        self._backend.encode_special_tokens = special_tokens != "id"
        self._backend.no_truncation()
        self._backend.no_padding()
        self.content = content
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.vocab_size: int = self._backend.get_vocab_size(with_added_tokens=True)
        self.max_token_id: int = max(self._backend.get_vocab(with_added_tokens=True).values())
        self.dtype: np.dtype[Any] = token_dtype(self.max_token_id)
        self.is_bytes = content == bytes_tokenizer()
        self.special_tokens = special_tokens
        self.special_names = tuple(token.content for token in added.values() if token.special)
        self.found_names = tuple(
            token.content for token in added.values() if special_tokens == "id" or not token.special
        )
        layout = orjson.loads(content)
        self.why_lossy = _why_lossy(layout) or self._why_token_lossy()
        self._can_cut = not _why_lossy(layout) and _splits_as_ours(layout)

    def check_end(self, origin: str) -> None:
        """Refuse an end-of-document token that is a piece of ordinary text.

        Args:
            origin: Where the tokenizer came from, for the message.

        Raises:
            DataError: It is one.
        """
        is_special = self.eos_token in self.special_names
        if is_special and self.special_tokens != "text":
            return  # documents that spell it are rejected, or end there as was asked for
        ids, _ = self.encode_plain([self.eos_token])
        if self.eos_id not in ids.tolist():
            return
        way_out = (
            "reject documents that spell it with --special-tokens reject"
            if is_special
            else "name a special token with --eos-token"
        )
        raise DataError(
            f"{origin} encodes the text {self.eos_token!r} as its end-of-document token, so text "
            f"could end a document; {way_out}"
        )

    def find_special(self, text: bytes) -> str | None:
        """The first special token that a text in UTF-8 spells, if any."""
        return next((name for name in self.special_names if name.encode() in text), None)

    def special_id(self, name: str) -> int:
        """The id of one of `special_names`."""
        number = self._backend.token_to_id(name)
        assert number is not None, name
        return int(number)

    def encode_documents(self, texts: Sequence[str]) -> tuple[TokenArray, NDArray[np.int64]]:
        """Encode documents and append EOS to each.

        Args:
            texts: The documents.

        Returns:
            All ids one after the other, `[sum(lengths)]`, and the length of each document
            including its EOS, `[len(texts)]`. Example with bytes: ["ab", ""] gives
            [97, 98, 256, 256] and [3, 1].
        """
        pieces = self._encode_pieces(texts)
        lengths = np.array([len(piece) + 1 for piece in pieces], dtype=np.int64)
        flat: TokenArray = np.empty(int(lengths.sum()), dtype=self.dtype)
        start = 0
        for piece in pieces:
            flat[start : start + len(piece)] = piece
            start += len(piece) + 1
            flat[start - 1] = self.eos_id
        return flat, lengths

    def encode_plain(self, texts: Sequence[str]) -> tuple[TokenArray, NDArray[np.int64]]:
        """Encode documents without EOS.

        Returns:
            All ids one after the other, and the position where each document ends. Example with
            bytes: ["ab", "c"] gives [97, 98, 99] and [2, 3].
        """
        pieces = self._encode_pieces(texts)
        return np.concatenate(pieces), np.cumsum([len(piece) for piece in pieces])

    def decode(self, ids: Sequence[int] | TokenArray) -> str:
        """Text of `ids`; special tokens appear by name."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=False)

    def _encode_pieces(self, texts: Sequence[str]) -> list[TokenArray]:
        """Ids of each text without EOS; a giant text goes through in parts, to bound memory."""
        if self.is_bytes and self.special_tokens != "id":
            return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]
        if not self._may_cut() or max(map(len, texts), default=0) <= PART_CHARACTERS:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
            return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]
        return [
            np.concatenate(
                [
                    np.array(encoding.ids, dtype=self.dtype)
                    for part in cut_text(text, PART_CHARACTERS)
                    for encoding in self._backend.encode_batch_fast(
                        [part], add_special_tokens=False
                    )
                ]
            )
            for text in texts
        ]

    def _may_cut(self) -> bool:
        """Whether texts may be cut: a token that is found in them could span the cut."""
        return self._can_cut and not any("\n" in name for name in self.found_names)

    def _why_token_lossy(self) -> str:
        """A token beside the vocabulary whose letters the decoder would take for bytes."""
        known = self._backend.get_vocab(with_added_tokens=True)
        lossy = (name for name in self.found_names if self.decode([known[name]]) != name)
        return "".join(
            f"the added token {name!r} decodes to something else" for name in [*lossy][:1]
        )

    def _find_eos(self, wanted: str | None, origin: str) -> tuple[str, int]:
        for name in (wanted,) if wanted else USUAL_EOS_NAMES:
            number = self._backend.token_to_id(name)
            if number is not None:
                return name, number
        if wanted:
            raise DataError(f"--eos-token {wanted!r} is not in the vocabulary of {origin}")
        raise DataError(
            f"{origin} has none of the usual end-of-document tokens {', '.join(USUAL_EOS_NAMES)}; "
            "name it with --eos-token"
        )


def cut_text(text: str, size: int) -> Iterator[str]:
    """Cut a text into parts of about `size` characters, each ending in a line end before a letter.

    SPLIT_PATTERN has no piece that spans such a position and none looks back over it, so
    encoding the parts one by one gives the ids of the whole.
    """
    start = 0
    while len(text) - start > size:
        line_end = LINE_BEFORE_LETTER.search(text, start + size)
        if line_end is None:
            break
        yield text[start : line_end.start() + 1]
        start = line_end.start() + 1
    yield text[start:]


def token_dtype(max_token_id: int) -> np.dtype[Any]:
    """uint16 when every id fits, else uint32."""
    return np.dtype(np.uint16) if max_token_id < 1 << 16 else np.dtype(np.uint32)


def read_tokenizer(
    path: Path, eos_token: str | None = None, special_tokens: SpecialTokens = "text"
) -> Tokenizer:
    """Load a tokenizer.json, or the one in a directory (with its tokenizer_config.json).

    Raises:
        DataError: There is none, or it cannot be used.
    """
    file = path
    try:
        file = path / "tokenizer.json" if path.is_dir() else path
        content = file.read_bytes()
    except OSError as error:
        raise DataError(
            f"--tokenizer {shown(file)}: {error.strerror}; give a tokenizer.json, a directory that "
            "holds one, train:VOCABULARY or bytes"
        ) from error
    named = eos_token or _configured_eos(file.parent)
    return Tokenizer(content, named, str(file), special_tokens)


def bytes_tokenizer() -> bytes:
    """The tokenizer.json whose ids 0..255 are the UTF-8 bytes and 256 is the end of text."""
    symbols = _byte_symbols()
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={symbols[value]: value for value in range(NUM_BYTES)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    return backend.to_str(pretty=True).encode()


def check_vocabulary(vocab_size: int) -> None:
    """Refuse a vocabulary that leaves no room for the 256 bytes and the end of text.

    Raises:
        DataError: It does.
    """
    if vocab_size < SMALLEST_TRAINED_VOCABULARY:
        raise DataError(
            f"--tokenizer train:{vocab_size} is below {SMALLEST_TRAINED_VOCABULARY} (256 bytes and "
            f"the end of text); ask for more, or use --tokenizer bytes"
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train byte-level BPE; the result depends on the texts and the size alone.

    Args:
        texts: Training documents.
        vocab_size: Size with the end-of-text token; a tiny corpus gives fewer.

    Returns:
        The bytes of the tokenizer.json.

    Raises:
        DataError: `vocab_size` leaves no room for the 256 bytes and the end of text.
    """
    check_vocabulary(vocab_size)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(END_OF_TEXT, special=True)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    return backend.to_str(pretty=True).encode()


def _why_lossy(layout: Mapping[str, Any]) -> str:
    """Why the parts of a tokenizer.json do not promise that decoding gives a text back."""
    if layout.get("normalizer") is not None:
        return "it normalizes text"
    steps = _split_steps(layout)
    vocabulary = (layout.get("model") or {}).get("vocab")
    added = layout.get("added_tokens") or []
    promises = (
        all(step.get("behavior") != "Removed" for step in steps)
        and any(step.get("type") == "ByteLevel" for step in steps)
        and not any(step.get("add_prefix_space") for step in steps)
        and (layout.get("decoder") or {}).get("type") == "ByteLevel"
        and isinstance(vocabulary, dict)
        and all(symbol in vocabulary for symbol in _byte_symbols())
        and not any(token.get("lstrip") or token.get("rstrip") for token in added)
    )
    return "" if promises else "its pieces are not bytes"


def _splits_as_ours(layout: Mapping[str, Any]) -> bool:
    """Whether it splits by the one pattern for which `cut_text` is known to change nothing."""
    return _split_steps(layout)[0].get("pattern") == {"Regex": SPLIT_PATTERN}


def _split_steps(layout: Mapping[str, Any]) -> list[dict[str, Any]]:
    pieces = layout.get("pre_tokenizer") or {}
    return pieces.get("pretokenizers") or [pieces]


def _configured_eos(directory: Path) -> str | None:
    """The eos_token of a tokenizer_config.json next to the tokenizer, if it names one."""
    try:
        value = json.loads((directory / "tokenizer_config.json").read_text("utf-8"))["eos_token"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    name = value.get("content") if isinstance(value, dict) else value
    return name if isinstance(name, str) else None


def _byte_symbols() -> list[str]:
    """The printable character that byte-level tokenizers use for each byte value."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(NUM_BYTES) if value not in printable]
    symbols = {value: chr(value) for value in printable}
    symbols.update({value: chr(NUM_BYTES + rank) for rank, value in enumerate(others)})
    return [symbols[value] for value in range(NUM_BYTES)]
