"""When a text ends: at the end-of-text token, at a stop string, or at its limit."""

from collections.abc import Collection, Sequence

import tokenizers


class StopStrings:
    """Strings that end a text where they appear.

    Args:
        tokenizer: spells tokens.
        strings: not empty ones.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, strings: Sequence[str]) -> None:
        assert all(strings), strings
        self.strings = tuple(strings)
        self._tokenizer = tokenizer
        # A token spells at least a byte; some more, as the first letters of a piece may be lost.
        self._window = max(len(string.encode()) for string in strings) + 4

    def complete(self, tokens: Sequence[int]) -> bool:
        """Whether the text of some tokens has a stop string that ends with the last of them."""
        tail = list(tokens[-self._window :])
        text = self._tokenizer.decode(tail, skip_special_tokens=True)
        return any(string in text for string in self.strings)

    def cut(self, text: str) -> str:
        """A text up to the first of the strings."""
        places = [place for string in self.strings if (place := text.find(string)) >= 0]
        return text[: min(places)] if places else text

    def held_back(self, text: str) -> int:
        """How many last letters of a text may be the beginning of a stop string."""
        longest = 0
        for string in self.strings:
            for length in range(1, len(string)):
                if text.endswith(string[:length]):
                    longest = max(longest, length)
        return longest


class Ending:
    """What one row may still get.

    Args:
        max_new_tokens: its limit.
        eos_id: token, or tokens, that end the text; None = no token does.
        stop: ends the text; None = no string does.

    Attributes:
        ended: whether it gets nothing more.
        at_limit: whether nothing but its limit ended it.
    """

    def __init__(
        self,
        max_new_tokens: int,
        eos_id: int | Collection[int] | None,
        stop: StopStrings | None = None,
    ) -> None:
        self.ended = self.at_limit = False
        self._room = max_new_tokens
        eos_ids = [eos_id] if isinstance(eos_id, int) else eos_id
        self._eos_ids = frozenset(eos_ids or ())
        self._stop = stop
        self._tokens: list[int] = []

    def take(self, block: Sequence[int]) -> int:
        """How many of a block's tokens, from the first, belong to the text."""
        for count, token in enumerate(block, 1):
            self._room -= 1
            said = token in self._eos_ids
            if self._stop is not None:
                self._tokens.append(token)
                said = said or self._stop.complete(self._tokens)
            self.at_limit = self._room == 0 and not said
            self.ended = said or self.at_limit
            if self.ended:
                return count
        return len(block)
