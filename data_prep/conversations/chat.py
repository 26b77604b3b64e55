"""Chats to marked text, by templates of the kind that `transformers` applies (Jinja, in a sandbox).

Which text is the assistant's is known in one of two ways. A template with `{% generation %}` blocks
says so. Of any other, the chat up to a turn of the assistant is rendered with the generation prompt
(what the model is given) and with the turn (what it is to write): the turn is what the second has
beyond the first.

A template writes special tokens by their names. So that nobody can write one in a message, names in
messages are broken before and mended after: what is whole in the rendered text is the template's.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data_prep.conversations.marks import SPECIAL, TOGGLE
from data_prep.conversations.values import MISSING, FormError, key_faults

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
MESSAGES = "a list of messages"
_BREAK = "\udcfd"
_LONGEST_REASON = 120

Message = Mapping[str, object]


class Chat(NamedTuple):
    """How chats are rendered; the fields are those of `forms.ChatForm`."""

    template: str
    variables: Mapping[str, str]
    special_names: tuple[str, ...]
    eos_token: str
    special_tokens: Literal["text", "id", "reject"]


def check_template(template: str) -> None:
    """Compile a template.

    Raises:
        jinja2.TemplateError: It is not one.
    """
    _compiled(template)


def check_messages(value: object, key: str) -> list[Message]:
    """The messages of a record, each without the keys that are null.

    Raises:
        FormError: They are not a list of messages with a role and text.
    """
    missing, no_messages = key_faults(key, MESSAGES)
    if value is MISSING:
        raise FormError(missing)
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise FormError(no_messages)
    if not value:
        raise FormError(f"{key!r} is empty")
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError:
        raise FormError("lone surrogate") from None
    messages: list[Message] = [
        {name: part for name, part in message.items() if part is not None} for message in value
    ]
    for message in messages:
        if message.get("role") not in ROLES:
            raise FormError("unknown role")
        if not isinstance(message.get("content", ""), str):
            raise FormError("the content of a message is not a string")
        if "content" not in message and "tool_calls" not in message:
            raise FormError("a message without content")
    return messages


def render_chat(chat: Chat, messages: Sequence[Message]) -> str:
    """The marked text of a chat; the end of the document itself is left out.

    Raises:
        FormError: The template refuses it, or a message spells a special token and may not.
    """
    names = _names(chat.special_names)
    if names is not None and chat.special_tokens != "id":
        messages = [_broken(message, names, chat.special_tokens) for message in messages]
    whole = _render(chat, messages)
    if TOGGLE not in whole:
        whole = _mark_turns(chat, messages, whole)
    if names is not None:
        whole = names.sub(lambda found: f"{SPECIAL}{found[0]}{SPECIAL}", whole)
    whole = whole.replace(_BREAK, "")
    # What follows the last end of a turn is never written by the model; the end-of-document token,
    # which every document gets, stands for it where it is the same token.
    end = re.escape(f"{SPECIAL}{chat.eos_token}{SPECIAL}")
    return re.sub(rf"{end}\s*({TOGGLE}?)\s*\Z", r"\1", whole)


def _mark_turns(chat: Chat, messages: Sequence[Message], whole: str) -> str:
    """The rendered chat with marks around what the assistant wrote."""
    marked, done = [], 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        given = _render(chat, messages[:number], add_generation_prompt=True)
        with_turn = _render(chat, messages[: number + 1])
        is_prefix = with_turn.startswith(given) and whole.startswith(with_turn)
        if not is_prefix or len(given) < done:
            raise FormError("the chat template changes earlier turns; it needs {% generation %}")
        marked += [whole[done : len(given)], TOGGLE, whole[len(given) : len(with_turn)], TOGGLE]
        done = len(with_turn)
    return "".join([*marked, whole[done:]])


def _render(chat: Chat, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
    try:
        return _compiled(chat.template).render(
            **chat.variables, messages=messages, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # whatever a template does
        why = " ".join(str(error).split())[:_LONGEST_REASON]
        why = why.encode("utf-8", "replace").decode()
        raise FormError(f"the chat template refuses it: {why or type(error).__name__}") from None


def _broken(message: Message, names: re.Pattern[str], policy: str) -> Message:
    """A message in which no special token is spelled.

    Raises:
        FormError: One is, and `policy` is to reject it.
    """

    def mend(value: object) -> object:
        if isinstance(value, str):
            found = names.search(value)
            if found and policy == "reject":
                raise FormError(f"spells {found[0]!r}")
            # Before every place where one begins, so that those that overlap are broken, too.
            return re.sub(f"(?={names.pattern})", _BREAK, value) if found else value
        if isinstance(value, Mapping):
            return {name: mend(part) for name, part in value.items()}
        return [mend(part) for part in value] if isinstance(value, list) else value

    return {name: mend(part) for name, part in message.items()}


@lru_cache(maxsize=8)
def _names(special_names: tuple[str, ...]) -> re.Pattern[str] | None:
    """Finds special tokens that are not broken, the longest where several begin."""
    if not special_names:
        return None
    longest_first = sorted(special_names, key=len, reverse=True)
    return re.compile(f"(?<!{_BREAK})(?:{'|'.join(map(re.escape, longest_first))})")


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )
    # No clock: the same records give the same bytes on any day.
    environment.globals["raise_exception"] = _refuse
    environment.filters["tojson"] = _to_json
    return environment.from_string(template)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: object, indent: int | None = None) -> str:
    """As transformers has it: the library's own escapes what HTML would take for tags."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` around what the assistant wrote."""

    tags = {"generation"}  # noqa: RUF012  # a set in the class it extends

    def parse(self, parser: Parser) -> nodes.Node:
        """The block as a call of `_mark`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], Any]) -> str:
        return f"{TOGGLE}{caller()}{TOGGLE}"
