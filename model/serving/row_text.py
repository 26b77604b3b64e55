"""The text of one row as its pieces come, with what is said of its tokens."""

from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

import tokenizers

from model.decoding.batch import Piece
from model.decoding.stopping import StopStrings
from model.decoding.text_stream import TextStream

Finish = Literal["stop", "length"]


class TokenNote(NamedTuple):
    """What is said of one token.

    Attributes:
        text: its spelling; pieces of a character are shown as a replacement.
        logprob: logarithmic probability by head 1.
        likeliest: spellings and logarithmic probabilities of the likeliest tokens at its place.
    """

    text: str
    logprob: float
    likeliest: list[tuple[str, float]]


class Delta(NamedTuple):
    """What one piece added.

    Attributes:
        text: may be empty; letters that a stop string may yet take away are held back.
        notes: of its tokens, if they were asked for.
        finish: why the text has ended; None = it has not.
    """

    text: str
    notes: list[TokenNote]
    finish: Finish | None


class RowText:
    """Turns the pieces of one row into text.

    Args:
        tokenizer: spells tokens.
        prompt: tokens before the new ones.
        eos_ids: tokens that end texts and are not shown.
        stop: strings that end the text and are not shown.

    Attributes:
        num_tokens: new tokens so far, one that ended the text among them.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        prompt: Sequence[int],
        eos_ids: Collection[int],
        stop: StopStrings | None,
    ) -> None:
        self.num_tokens = 0
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids
        self._stream = TextStream(tokenizer, prompt, stop)

    def add(self, piece: Piece) -> Delta:
        """What the next piece adds."""
        self.num_tokens += len(piece.tokens)
        shown = [token for token in piece.tokens if token not in self._eos_ids]
        text = self._stream.add(shown)
        notes = []
        if piece.logprobs is not None and piece.likeliest is not None:
            notes = [
                TokenNote(self._spelled(token), own, [(self._spelled(t), p) for t, p in others])
                for token, own, others in zip(
                    piece.tokens, piece.logprobs, piece.likeliest, strict=True
                )
                if token not in self._eos_ids
            ]
        finish: Finish | None = None
        if piece.ended:
            text += self._stream.finish()
            finish = "length" if piece.at_limit else "stop"
        return Delta(text, notes, finish)

    def _spelled(self, token: int) -> str:
        return str(self._tokenizer.decode([token], skip_special_tokens=False))
