"""Prompts of requests as tokens: texts, tokens, and chats by the template of the export."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from foundation.shown_text import printable, reason
from model.errors import CheckpointError
from model.serving.bodies import Message
from model.serving.errors import refused


class Prompts:
    """Makes tokens.

    Args:
        directory: the export.
        tokenizer: its tokenizer; text that spells a special token is ordinary text to it.
        vocab_size: tokens that the model knows.
        begin: what an empty prompt becomes; None = it is refused.
        positions: tokens of a prompt and its continuation together.
    """

    def __init__(
        self,
        directory: Path,
        tokenizer: tokenizers.Tokenizer,
        vocab_size: int,
        begin: int | None,
        positions: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._begin = begin
        self._positions = positions
        self._chats = _chat_tokenizer(directory)

    @property
    def has_template(self) -> bool:
        """Whether chats can be made."""
        return bool(self._chats.chat_template)

    def of_completion(
        self, prompt: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]], most: int
    ) -> list[list[int]]:
        """Prompts of a completion: one or several, as text or as tokens.

        Raises:
            ApiError: there is none or more than `most`, or one cannot be used.
        """
        several: Sequence[Any] = (
            [prompt]
            if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int))
            else prompt
        )
        if not 1 <= len(several) <= most:
            raise refused("prompt", f"has {len(several)} prompts; give 1 to {most}")
        return [self._tokens(one) for one in several]

    def of_chat(self, messages: Sequence[Message]) -> list[int]:
        """The prompt of a chat, up to where the assistant's answer begins.

        Special tokens are those of the template, and of messages that spell them, as everywhere
        where transformers applies it.

        Raises:
            ApiError: there is no template, or it refuses the messages.
        """
        if not self.has_template:
            raise refused(
                "messages", "this model has no chat template; use /v1/completions", "no_template"
            )
        plain = [message.plain() for message in messages]
        for message in plain:
            for text in message.values():
                _check_text("messages", text)
        try:
            text = self._chats.apply_chat_template(
                plain, tokenize=False, add_generation_prompt=True
            )
            ids = self._chats(text, add_special_tokens=False)["input_ids"]
        except Exception as error:  # whatever a template does
            why = printable(reason(error))
            raise refused("messages", f"the model's chat template refuses them: {why}") from error
        return self._checked("messages", list(ids))

    def room(self, prompt: Sequence[int], wanted: int | None, usual: int | None) -> int:
        """How many tokens may follow a prompt.

        Args:
            prompt: its tokens.
            wanted: what the request says.
            usual: where it says nothing; None = as many as there is room for.

        Raises:
            ApiError: there is less room than the request says.
        """
        room = self._positions - len(prompt)
        if wanted is not None and wanted > room:
            raise refused(
                "max_tokens",
                f"{len(prompt)} tokens of the prompt and {wanted} new ones are more than the "
                f"{self._positions} that a text may have here; ask for {room} at most",
                "context_length_exceeded",
            )
        if wanted is not None:
            return wanted
        return room if usual is None else min(usual, room)

    def _tokens(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            _check_text("prompt", prompt)
            ids = self._tokenizer.encode(prompt, add_special_tokens=False).ids
        else:
            ids = list(prompt)
            if any(not 0 <= token < self._vocab_size for token in ids):
                raise refused("prompt", f"has a token that is not from 0 to {self._vocab_size - 1}")
        return self._checked("prompt", ids)

    def _checked(self, param: str, ids: list[int]) -> list[int]:
        if not ids and self._begin is None:
            raise refused(param, "is empty, and this model was not trained to begin a text")
        ids = ids or [self._begin or 0]
        if len(ids) >= self._positions:
            raise refused(
                param,
                f"has {len(ids)} tokens, and a text may have {self._positions} here; shorten it to "
                f"at most {self._positions - 1}",
                "context_length_exceeded",
            )
        return ids


def _check_text(param: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise refused(param, "has halves of characters; send UTF-8 text") from None


def _chat_tokenizer(directory: Path) -> Any:
    """The export's tokenizer as transformers has it, which knows the chat template."""
    from transformers import AutoTokenizer, LlamaConfig

    try:
        # Without a configuration it would look for that of the model, which may be code.
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, config=LlamaConfig())
    except Exception as error:  # transformers raises many kinds
        raise CheckpointError(
            f"{directory}: transformers does not take its tokenizer ({reason(error)}); export again"
        ) from error
