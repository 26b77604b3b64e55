"""What an export says beside its weights: ids of special tokens, tokenizer files, defaults.

Of a run that began with a model it is what that model's folder said. Of any other run:

    end of text        the token that ends the documents of the shards
    beginning of text  the same, if training went across it; with data.document_mask nothing was
                       trained to follow it, and there is none
    padding            a special token of that purpose, else the end of text
"""

import json
from typing import Any, NamedTuple

import tokenizers

from model.hugging_face.config import TOKEN_IDS
from model.hugging_face.folder import TOKENIZER_NAME, ExportDescription
from model.hugging_face.identity import (
    GENERATION_NAME,
    TOKENIZER_CONFIG_NAME,
    ImportedIdentity,
)

PADDING_NAMES = ("<pad>", "<|pad|>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>")


class Identity(NamedTuple):
    """What an export says beside its weights.

    Attributes:
        config: keys of config.json.
        files: whole files by name, tokenizer.json among them.
        card: what the model card says of it, as names and values.
    """

    config: dict[str, Any]
    files: dict[str, bytes]
    card: list[tuple[str, str]]


class _Token(NamedTuple):
    """A special token."""

    name: str
    id: int


def own_identity(
    description: ExportDescription, tokenizer: bytes, *, crosses_documents: bool = True
) -> Identity:
    """The identity of a model that was trained from nothing.

    Args:
        description: what the export is of.
        tokenizer: tokenizer.json of the shards.
        crosses_documents: whether what follows an end of text was trained.
    """
    end = _Token(description.eos_token, description.eos_id)
    begin = end if crosses_documents else None
    padding = _padding(tokenizer) or end
    config: dict[str, Any] = {"bos_token_id": begin and begin.id, "eos_token_id": end.id}
    generation = config | {"pad_token_id": padding.id}
    if padding != end:
        # In config.json it takes a token out of training: the end of text must stay in it.
        config["pad_token_id"] = padding.id
    plain = _adding_nothing(tokenizer)
    files = {
        TOKENIZER_NAME: plain,
        GENERATION_NAME: _json(generation),
        TOKENIZER_CONFIG_NAME: _json(_tokenizer_config(description, begin, end, padding)),
    }
    beginning = (
        f"{begin.name!r}, the end of the text before"
        if begin
        else f"none: with `data.document_mask` nothing was trained to follow {end.name!r}, so a "
        "text needs a prompt"
    )
    card = [
        ("Beginning of text", beginning),
        ("End of text", f"{end.name!r}, id {end.id}"),
        ("Padding", f"{padding.name!r}, id {padding.id}"),
    ]
    if plain != tokenizer:
        card.append(("Tokenizer", "adds no token to a text, unlike that of the shards"))
    return Identity(config, files, card)


def kept_identity(
    description: ExportDescription, tokenizer: bytes, imported: ImportedIdentity
) -> Identity:
    """The identity of a model that was imported: the one it had.

    Args:
        description: what the export is of.
        tokenizer: tokenizer.json of the shards.
        imported: what was kept of the model's folder.
    """
    files = {name: file.content for name, file in imported.files.items()}
    if TOKENIZER_CONFIG_NAME in files:
        settings = _usable(imported.json_of(TOKENIZER_CONFIG_NAME), description.sequence_length)
        if settings != imported.json_of(TOKENIZER_CONFIG_NAME):
            files[TOKENIZER_CONFIG_NAME] = _json(settings)
    else:
        files[TOKENIZER_CONFIG_NAME] = _json(_default_tokenizer_config(description, tokenizer))
    files[TOKENIZER_NAME] = tokenizer
    card = _what_was_kept(description, imported)
    return Identity(dict(imported.config), files, card)


def _usable(settings: dict[str, Any], positions: int) -> dict[str, Any]:
    """A tokenizer_config.json without code that is not here, and with the positions it now has."""
    usable = dict(settings)
    if usable.pop("auto_map", None) is not None:
        usable["tokenizer_class"] = "PreTrainedTokenizerFast"
    longest = usable.get("model_max_length")
    if isinstance(longest, int | float) and longest < positions:
        usable["model_max_length"] = positions
    return usable


def _what_was_kept(
    description: ExportDescription, imported: ImportedIdentity
) -> list[tuple[str, str]]:
    """Rows of the model card."""
    ids = ", ".join(f"{key} {imported.token_ids(key)}" for key in TOKEN_IDS)
    rows = [
        (f"Kept of `{imported.source}`", f"{ids}; {imported.positions:,} positions"),
        ("Kept files", ", ".join(f"`{name}`" for name in imported.files) or "none"),
    ]
    origin = {
        "same": "that of the model, byte for byte",
        "larger": "that of the shards, with all tokens of the model under their ids",
        "unknown": "that of the shards; the model had none to compare it with",
    }
    rows.append((f"`{TOKENIZER_NAME}`", origin[imported.tokenizer]))
    if TOKENIZER_CONFIG_NAME not in imported.files:
        rows.append((f"`{TOKENIZER_CONFIG_NAME}`", "made for the tokenizer of the shards"))
    rows += [(f"Not kept: `{name}`", why) for name, why in imported.left_out.items()]
    settings = imported.json_of(TOKENIZER_CONFIG_NAME)
    usable = _usable(settings, description.sequence_length)
    if changed := sorted(key for key in settings if settings[key] != usable.get(key)):
        names = ", ".join(f"`{key}`" for key in changed)
        rows.append((f"Changed in `{TOKENIZER_CONFIG_NAME}`", names))
    if description.sequence_length > imported.positions:
        rows.append(("Positions", f"{description.sequence_length:,}, as many as it was trained on"))
    if description.eos_id not in imported.eos_ids:
        end = f"{description.eos_token!r}, id {description.eos_id}"
        rows.append(("Documents ended with", f"{end}, at which `generate` does not stop"))
    return rows


def _tokenizer_config(
    description: ExportDescription, begin: _Token | None, end: _Token, padding: _Token
) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **({"bos_token": begin.name} if begin else {}),
        "eos_token": end.name,
        "pad_token": padding.name,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": description.sequence_length,
        "clean_up_tokenization_spaces": False,
    }


def _default_tokenizer_config(description: ExportDescription, tokenizer: bytes) -> dict[str, Any]:
    """For a model whose folder has none: it names no beginning of text, so there is none."""
    end = _Token(description.eos_token, description.eos_id)
    return _tokenizer_config(description, None, end, _padding(tokenizer) or end)


def _padding(tokenizer: bytes) -> _Token | None:
    """The special token for padding that a tokenizer has; no text is encoded as one."""
    added = tokenizers.Tokenizer.from_buffer(tokenizer).get_added_tokens_decoder()
    special = {token.content: number for number, token in added.items() if token.special}
    return next((_Token(name, special[name]) for name in PADDING_NAMES if name in special), None)


def _adding_nothing(tokenizer: bytes) -> bytes:
    """A tokenizer.json that adds no token to a text, as the shards had none but the end."""
    backend = tokenizers.Tokenizer.from_buffer(tokenizer)
    backend.no_padding()
    if not backend.encode("").ids:
        return tokenizer
    layout = json.loads(tokenizer)
    steps = layout["post_processor"]
    steps = steps["processors"] if steps["type"] == "Sequence" else [steps]
    # The others are templates; this one only moves offsets.
    kept = [step for step in steps if step["type"] == "ByteLevel"]
    layout["post_processor"] = kept[0] if kept else None
    return json.dumps(layout, ensure_ascii=False, indent=2).encode()


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
