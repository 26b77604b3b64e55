"""How many bytes of a text each token spells, for figures per byte.

Tokenizers whose pieces are bytes (byte-level BPE, such as those that are trained here, GPT-2's and
Llama 3's) say it exactly. Of others, such as Llama 2's, the mark of a space is one byte, a byte
piece `<0xE2>` is one, and every other piece has the bytes of its letters; the space that they put
before a text counts, too.
"""

import json
import re
from typing import Any

import tokenizers

_SPACE = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def bytes_of_tokens(tokenizer: tokenizers.Tokenizer, vocab_size: int) -> list[int]:
    """Bytes of UTF-8 that each id stands for; special tokens and ids without a token spell none.

    Args:
        tokenizer: whose tokens they are.
        vocab_size: how many ids the model has.

    Returns:
        A number for each of the model's ids.
    """
    added = tokenizer.get_added_tokens_decoder()
    by_letters = not _has(json.loads(tokenizer.to_str()).get("decoder"), "ByteLevel")
    found = [0] * vocab_size
    for piece, number in tokenizer.get_vocab(with_added_tokens=True).items():
        if number in added:
            found[number] = 0 if added[number].special else len(piece.encode())
        elif by_letters:
            found[number] = (
                1 if _BYTE.fullmatch(piece) else len(piece.replace(_SPACE, " ").encode())
            )
        else:
            found[number] = len(piece)  # one letter for each byte
    return found


def _has(decoder: Any, kind: str) -> bool:
    """Whether a decoder, or one of a sequence of them, is of a kind."""
    if not isinstance(decoder, dict):
        return False
    return decoder.get("type") == kind or any(
        _has(part, kind) for part in decoder.get("decoders") or ()
    )
