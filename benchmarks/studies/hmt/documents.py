"""Long documents made of what lies on the machine, and the streams that a model is asked about.

A document is the files of one folder, one after the other. Two documents that take turns switch the
context: what a segment needs was read before the last switch. Diluted ones have filler between.

Legend: B streams, S tokens.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
from torch import Tensor

from benchmarks.source_corpus import SUFFIXES

FILLER = "$"
_FEWEST, _MOST = 9_000, 40_000  # characters of a document
_LARGEST_FILE_BYTES = 200_000
# Characters that a document has before the other one's turn: about a segment of 64 tokens.
_TURN = 140


class Streams(NamedTuple):
    """Tokens `[B, S]` of one kind, and which of them count as targets, likewise."""

    tokens: Tensor
    counted: Tensor


def long_texts(roots: Sequence[Path], most: int, seed: int = 1) -> list[str]:
    """Documents of so many characters in all, of folders in a random order."""
    folders = sorted(
        folder for root in roots for folder in [root, *root.rglob("*")] if folder.is_dir()
    )
    random.Random(seed).shuffle(folders)
    texts, size = [], 0
    for folder in folders:
        if size >= most:
            break
        text = _text_of(folder)
        if len(text) >= _FEWEST:
            texts.append(text)
            size += len(text)
    return texts


def _text_of(folder: Path) -> str:
    """The files of a folder, as far as a document reaches."""
    text = ""
    for path in sorted(folder.iterdir()):
        if path.suffix not in SUFFIXES or not path.is_file():
            continue
        if path.stat().st_size > _LARGEST_FILE_BYTES:
            continue
        try:
            text += path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if len(text) >= _MOST:
            break
    return text[:_MOST]


def taking_turns(first: str, second: str) -> str:
    """Two texts, whole lines of one and of the other, until one of them has ended."""
    both = zip(_turns(first), _turns(second), strict=False)
    return "".join(itertools.chain.from_iterable(both))


def _turns(text: str) -> Iterator[str]:
    turn = ""
    for line in text.splitlines(keepends=True):
        turn += line
        if len(turn) >= _TURN:
            yield turn
            turn = ""


def streams(
    tokenizer: tokenizers.Tokenizer, texts: Sequence[str], length: int, segment: int
) -> dict[str, Streams]:
    """One stream of each text, and the same in turns of a segment and diluted.

    Args:
        tokenizer: of the model.
        texts: an even number, each long enough for a stream.
        length: S.
        segment: tokens of a turn.
    """
    tokens = torch.tensor([tokenizer.encode(text).ids[:length] for text in texts])
    filler = torch.full_like(tokens, tokenizer.encode(FILLER).ids[-1])
    everything = torch.ones_like(tokens, dtype=torch.bool)
    own = torch.arange(length) // segment % 2 == 0  # of the first of two that take turns
    return {
        "concatenated": Streams(tokens, everything),
        "interleaved": Streams(
            _alternating(tokens[::2], tokens[1::2], segment, length), everything[::2]
        ),
        "diluted": Streams(
            _alternating(tokens, filler, segment, length), own.expand(len(tokens), -1)
        ),
    }


def _alternating(first: Tensor, second: Tensor, segment: int, length: int) -> Tensor:
    """Segments of the one and of the other in turn, `[B, S]`."""
    pairs = zip(first.split(segment, dim=1), second.split(segment, dim=1), strict=True)
    return torch.cat(list(itertools.chain.from_iterable(pairs)), dim=1)[:, :length]
