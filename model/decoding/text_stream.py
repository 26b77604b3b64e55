"""Text as its tokens come: whole characters, and nothing that a stop string may yet take away."""

from collections.abc import Sequence

import tokenizers

from model.decoding.stopping import StopStrings

_UNFINISHED = "\ufffd"  # what bytes become that are no whole character


class TextStream:
    """Turns the new tokens of one text into what can be shown of it.

    Args:
        tokenizer: spells tokens.
        prompt: tokens before the new ones; pieces of one character may meet there.
        stop: strings that end the text and are not shown.
    """

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, prompt: Sequence[int], stop: StopStrings | None
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        # Tokens whose text was given, as far back as the next one's spelling may depend on.
        self._before = list(prompt[-4:])
        self._new: list[int] = []
        self._waiting = ""
        self._stopped = False

    def add(self, tokens: Sequence[int]) -> str:
        """What these tokens let be shown; may be nothing."""
        self._new += tokens
        before = self._decode(self._before)
        whole = self._decode(self._before + self._new)
        if whole.endswith(_UNFINISHED):
            return ""
        self._waiting += whole[len(before) :]
        self._before = (self._before + self._new)[-max(len(self._new), 4) :]
        self._new = []
        return self._show(all_of_it=False)

    def finish(self) -> str:
        """What was kept back, once no more tokens come."""
        before = self._decode(self._before)
        self._waiting += self._decode(self._before + self._new)[len(before) :]
        self._new = []
        return self._show(all_of_it=True)

    def _show(self, *, all_of_it: bool) -> str:
        text = self._waiting
        if self._stopped:
            return ""
        if self._stop is not None:
            cut = self._stop.cut(text)
            self._stopped = len(cut) < len(text)
            kept_back = 0 if all_of_it or self._stopped else self._stop.held_back(text)
            text = cut[: len(cut) - kept_back]
        self._waiting = self._waiting[len(text) :]
        return text

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)
