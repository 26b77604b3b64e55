"""How a record becomes a document of prompts and completions: by two keys, or by a chat template.

The parts are encoded one by one, so no token holds letters of two of them: the ids of a prompt are
those that it has when it is all there is, as when the model is asked.
"""

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict

from data_prep.conversations.chat import MESSAGES, Chat, check_messages, render_chat
from data_prep.conversations.marks import TOGGLE, pieces_of, to_bytes
from data_prep.conversations.values import MISSING, FormError, key_faults, value_at


class _Form(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PromptForm(_Form):
    """Two strings: what the model is given, and what it is to answer.

    Attributes:
        prompt_key: The key of the prompt; one with dots is nested.
        completion_key: That of the completion, whose tokens are the targets.
    """

    prompt_key: str
    completion_key: str

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of a record that are read."""
        return self.prompt_key, self.completion_key

    @property
    def options(self) -> str:
        """The options that name the keys, for messages."""
        return f"--prompt-key {self.prompt_key} and --completion-key {self.completion_key}"

    @property
    def key_faults(self) -> tuple[str, ...]:
        """The reasons of records that lack a key, or hold something else there."""
        return *key_faults(self.prompt_key), *key_faults(self.completion_key)

    def document(self, record: Mapping[str, object]) -> bytes:
        """The marked text of a record.

        Raises:
            FormError: It gives none.
        """
        prompt, completion = (_string_at(record, key) for key in self.keys)
        if not completion:
            raise FormError(f"{self.completion_key!r} is empty")
        return prompt + to_bytes(TOGGLE) + completion


class ChatForm(_Form):
    """A list of messages, written out by a chat template; the assistant's are the targets.

    Attributes:
        messages_key: The key of the list.
        template: The template.
        variables: What it knows beside the messages: `bos_token` and the like.
        special_names: Special tokens of the tokenizer; in what the template writes they are these.
        eos_token: Name of the end-of-document token.
        special_tokens: What a special token that a message spells is: text, the token, or the
            reason of a reject.
    """

    messages_key: str
    template: str
    variables: dict[str, str] = {}
    special_names: tuple[str, ...] = ()
    eos_token: str = ""
    special_tokens: Literal["text", "id", "reject"] = "text"

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of a record that are read."""
        return (self.messages_key,)

    @property
    def options(self) -> str:
        """The option that names the key, for messages."""
        return f"--messages-key {self.messages_key}"

    @property
    def key_faults(self) -> tuple[str, ...]:
        """The reasons of records that lack the key, or hold something else there."""
        return key_faults(self.messages_key, MESSAGES)

    def document(self, record: Mapping[str, object]) -> bytes:
        """The marked text of a record.

        Raises:
            FormError: It gives none.
        """
        messages = check_messages(value_at(record, self.messages_key), self.messages_key)
        chat = Chat(
            self.template,
            self.variables,
            self.special_names,
            self.eos_token,
            self.special_tokens,
        )
        document = to_bytes(render_chat(chat, messages))
        if not any(piece.is_target for piece in pieces_of(document)):
            raise FormError("no text of an assistant")
        return document


RecordForm = PromptForm | ChatForm


def _string_at(record: Mapping[str, object], key: str) -> bytes:
    missing, no_string = key_faults(key)
    value = value_at(record, key)
    if value is MISSING:
        raise FormError(missing)
    if not isinstance(value, str):
        raise FormError(no_string)
    try:
        return value.encode("utf-8")
    except UnicodeEncodeError:
        raise FormError("lone surrogate") from None
