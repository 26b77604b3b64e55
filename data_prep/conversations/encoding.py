"""Marked text to ids, part by part, with which of them are targets."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.conversations.marks import pieces_of
from data_prep.tokenization.encoder import Encoder
from data_prep.tokenization.tokenizer import TokenArray


class EncodedDocuments(NamedTuple):
    """Documents as ids.

    Attributes:
        tokens: All ids one after the other, each document closed by the end-of-document token.
        lengths: Tokens of each document.
        targets: Of each token whether it is a target, `[len(tokens)]`.
    """

    tokens: TokenArray
    lengths: NDArray[np.int64]
    targets: NDArray[np.bool_]


def encode_marked(encoder: Encoder, documents: Sequence[bytes]) -> EncodedDocuments:
    r"""Encode documents of several parts.

    Each part is encoded as if it were alone. The end of a document is a target when the part before
    it is.

    Args:
        encoder: Makes ids of texts.
        documents: Marked text, at least one.

    Returns:
        The ids. Example with bytes: `b"ab\xffc"` gives [97, 98, 99, 256] and [0, 0, 1, 1].

    Raises:
        DataError: As `Encoder.encode`.
    """
    parts = [list(pieces_of(document)) for document in documents]
    texts = [piece.text for pieces in parts for piece in pieces if not piece.is_special]
    ids, ends = encoder.encode_plain(texts) if texts else (np.empty(0), np.empty(0, np.int64))
    encoded = iter(np.split(ids, ends[:-1]))
    end = np.array([encoder.eos_id])
    flat, is_target, lengths = [], list[bool](), []
    for pieces in parts:
        before = len(is_target)
        for piece in pieces:
            own = np.array([encoder.id_of(piece.text)]) if piece.is_special else next(encoded)
            flat.append(own)
            is_target += [piece.is_target] * len(own)
        flat.append(end)
        is_target.append(bool(pieces) and pieces[-1].is_target)
        lengths.append(len(is_target) - before)
    return EncodedDocuments(
        tokens=np.concatenate(flat).astype(encoder.dtype),
        lengths=np.array(lengths, np.int64),
        targets=np.array(is_target, np.bool_),
    )
