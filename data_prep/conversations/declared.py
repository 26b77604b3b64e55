"""The form of a source's records from its options: keys, the chat template and what it knows."""

import json
from pathlib import Path
from typing import Any

import jinja2

from data_prep.conversations.chat import check_template
from data_prep.conversations.forms import ChatForm, PromptForm, RecordForm
from data_prep.errors import DataError, shown
from data_prep.tokenization.tokenizer import END_OF_TEXT, SpecialTokens, Tokenizer

TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"


def prompt_form(prompt_key: str | None, completion_key: str | None) -> PromptForm | None:
    """The form of prompts and completions; None when they were not asked for."""
    if prompt_key is None or completion_key is None:
        return None
    return PromptForm(prompt_key=prompt_key, completion_key=completion_key)


def chat_form(messages_key: str, template: Path | None, tokenizer_spec: str) -> ChatForm:
    """The form of chats.

    Args:
        messages_key: The key of the messages.
        template: A file; None = the template in the tokenizer's folder.
        tokenizer_spec: As --tokenizer was given.

    Raises:
        DataError: There is no template, or it cannot be used.
    """
    folder = _folder_of(tokenizer_spec)
    known = _read_known(folder)
    content = _read(template) if template else _template_of(folder, known, tokenizer_spec)
    try:
        check_template(content)
    except jinja2.TemplateError as error:
        where = shown(template) if template else f"of --tokenizer {tokenizer_spec}"
        raise DataError(
            f"the chat template {where} is not one ({error}); give a Jinja template with "
            "--chat-template FILE"
        ) from error
    variables = {
        name: text
        for name, value in known.items()
        if name.endswith("_token") and (text := _token_text(value))
    }
    return ChatForm(messages_key=messages_key, template=content, variables=variables)


def with_tokenizer(
    form: RecordForm | None, tokenizer: Tokenizer | None, special_tokens: SpecialTokens
) -> RecordForm | None:
    """The form with what it must know of the tokenizer; None of that while it is not trained."""
    if not isinstance(form, ChatForm):
        return form
    eos_token = tokenizer.eos_token if tokenizer else END_OF_TEXT
    return form.model_copy(
        update={
            "special_names": tokenizer.special_names if tokenizer else (),
            "eos_token": eos_token,
            "variables": {"eos_token": eos_token, **form.variables},
            "special_tokens": special_tokens,
        }
    )


def _folder_of(tokenizer_spec: str) -> Path | None:
    path = Path(tokenizer_spec)
    if not path.exists():
        return None
    return path if path.is_dir() else path.parent


def _read_known(folder: Path | None) -> dict[str, Any]:
    """The tokenizer_config.json of a tokenizer's folder; empty without a usable one."""
    if folder is None:
        return {}
    try:
        known = json.loads((folder / TOKENIZER_CONFIG).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def _template_of(folder: Path | None, known: dict[str, Any], tokenizer_spec: str) -> str:
    if folder is not None and (folder / TEMPLATE).is_file():
        return _read(folder / TEMPLATE)
    found = known.get("chat_template")
    if isinstance(found, list):  # several by name
        named = [entry for entry in found if isinstance(entry, dict)]
        found = {entry.get("name"): entry.get("template") for entry in named}.get("default")
    if isinstance(found, str):
        return found
    raise DataError(
        f"--tokenizer {tokenizer_spec} has no chat template, which --messages-key needs; give a "
        "Jinja template with --chat-template FILE"
    )


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise DataError(
            f"--chat-template {shown(path)} cannot be read: {reason}; give a Jinja template"
        ) from error


def _token_text(value: object) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None
