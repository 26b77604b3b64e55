"""What the folder of an imported model says beside its weights, kept so that exports say it again.

    config.json                       ids of special tokens, position limit, what training ignores
    generation_config.json            defaults of generate()
    tokenizer_config.json ...         special tokens, chat template, names of the model's inputs
    tokenizer.model, vocab.json ...   the vocabulary in other forms

A run copies it into each of its checkpoints, as one JSON file, so that an export needs the folder
no more. Nothing here decides whether a model can be imported: what cannot be kept is named.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from foundation.bounded_files import read_bounded
from foundation.json_text import read_json
from foundation.shown_text import printable, reason
from model.errors import CheckpointError
from model.hugging_face.config import CONFIG_NAME, DEFAULT_POSITIONS, TOKEN_IDS, positions_of
from model.hugging_face.early_exit import EarlyExit
from model.hugging_face.folder import TOKENIZER_NAME

GENERATION_NAME = "generation_config.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"

_MAX_FILE_BYTES = 8 << 20
_MAX_RECORD_BYTES = 1 << 27  # all files at their largest, in base64
_TOKENIZER_FILES = (
    *(TOKENIZER_CONFIG_NAME, "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json"),
)
# What holds the vocabulary itself, beside tokenizer.json, which comes from the shards.
_VOCABULARY_FILES = ("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model")
_TEMPLATES = "additional_chat_templates"
_NO_ID = -1  # how some older models write that there is none

TokenizerOrigin = Literal["same", "larger", "unknown"]


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


# Keys of config.json that change no logits and that transformers would read.
_OTHER_KEYS: dict[str, Callable[[object], bool]] = {
    "initializer_range": _is_number,
    "attention_dropout": _is_number,
    "pretraining_tp": lambda value: type(value) is int,
    "use_cache": lambda value: type(value) is bool,
}


class _Part(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64"
    )


class KeptFile(_Part):
    """A small file as it was.

    Attributes:
        sha256: of the content.
        content: its bytes; base64 in JSON.
    """

    sha256: str
    content: bytes

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if hashlib.sha256(self.content).hexdigest() != self.sha256:
            raise ValueError("the content is not that of the sha256")
        return self


class ImportedIdentity(_Part):
    """What an imported model is beside its weights.

    Attributes:
        source: name of its folder.
        positions: its max_position_embeddings.
        tokenizer: how the shards' tokenizer.json relates to its own: the same file, one that has
            all its tokens with their ids, or its own is not known.
        config: keys of config.json with their values, those of TOKEN_IDS that it has among them.
        files: small files by name.
        left_out: what the folder has and this has not, by name, with the reason.
        early_exit: of an adapter's run, which model the adapter drafts for.
    """

    version: Literal[1] = 1
    source: str
    positions: int = Field(gt=0, lt=2**31)
    tokenizer: TokenizerOrigin
    config: dict[str, Any]
    files: dict[str, KeptFile]
    left_out: dict[str, str]
    early_exit: EarlyExit | None = None

    @model_serializer(mode="wrap")
    def _without_what_others_lack(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Runs of other kinds say nothing of an early exit, as earlier versions wrote and read."""
        content: dict[str, Any] = handler(self)
        if content["early_exit"] is None:
            del content["early_exit"]
        return content

    @model_validator(mode="after")
    def _is_of_one_folder(self) -> Self:
        if not self.config.keys() <= {*TOKEN_IDS, *_OTHER_KEYS}:
            raise ValueError("other keys than are kept of a config.json")
        if not self.files.keys() <= {GENERATION_NAME, *_TOKENIZER_FILES, *_VOCABULARY_FILES}:
            raise ValueError("a file that is not kept of a folder")
        for name in self.files:
            if name.endswith(".json"):
                self.json_of(name)
        return self

    def json_of(self, name: str) -> dict[str, Any]:
        """The mapping in one of its JSON files; empty when it has no such file."""
        return _mapping(self.files[name].content) if name in self.files else {}

    def token_ids(self, key: str) -> Any:
        """The id, or ids, under a key of TOKEN_IDS, as transformers takes config.json."""
        return self.config.get(key, TOKEN_IDS[key])

    @property
    def eos_ids(self) -> set[int]:
        """The ids at which generate() stops."""
        ids = self.json_of(GENERATION_NAME).get("eos_token_id", self.token_ids("eos_token_id"))
        return _listed(ids)


def ending_tokens(directory: Path, vocab_size: int) -> set[int]:
    """The tokens of an export at which generate() of transformers stops.

    Raises:
        CheckpointError: what says so cannot be read.
    """
    ids: object = TOKEN_IDS["eos_token_id"]
    for path in (directory / CONFIG_NAME, directory / GENERATION_NAME):  # the second one wins
        try:
            ids = _mapping(read_bounded(path, _MAX_FILE_BYTES)).get("eos_token_id", ids)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({reason(error)}); export again"
            ) from error
    return {one for one in _listed(ids) if 0 <= one < vocab_size}


def read_identity(
    directory: Path, *, vocab_size: int, tokenizer: TokenizerOrigin
) -> ImportedIdentity:
    """What is kept of a folder whose config.json is that of a Llama.

    Args:
        directory: the folder.
        vocab_size: rows of its embedding.
        tokenizer: see `ImportedIdentity.tokenizer`.

    Raises:
        OSError: config.json cannot be read.
        ValueError: it is not JSON.
    """
    content = read_json(directory / CONFIG_NAME)
    config, left_out = _config_keys(content, vocab_size)
    positions = positions_of(content)
    if positions is None:
        left_out["max_position_embeddings"] = "not a number of positions"
    files = {}
    for name, found in _found_files(directory, tokenizer):
        if isinstance(found, str):
            left_out[name] = found
        else:
            files[name] = KeptFile(sha256=hashlib.sha256(found).hexdigest(), content=found)
    return ImportedIdentity(
        source=printable(directory.name),
        positions=positions or DEFAULT_POSITIONS,
        tokenizer=tokenizer,
        config=config,
        files=files,
        left_out=left_out,
    )


def load_identity(path: Path) -> ImportedIdentity | None:
    """What a checkpoint has kept; None when the run began with no model, or keeps nothing of it.

    Raises:
        CheckpointError: it cannot be read or is of another version.
    """
    try:
        return ImportedIdentity.model_validate_json(read_bounded(path, _MAX_RECORD_BYTES))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        fault = error.errors()[0]
        where = printable(".".join(map(str, fault["loc"])))
        raise CheckpointError(
            f"{path} cannot be understood ({where}: {fault['type']}); export another checkpoint, "
            "or with the version of Headway that wrote it"
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({reason(error)}); export another checkpoint"
        ) from error


def _listed(ids: object) -> set[int]:
    """The ids that a key names: one, several, or none."""
    listed = ids if isinstance(ids, list) else [ids]
    return {one for one in listed if type(one) is int}


def _config_keys(content: dict[str, Any], vocab_size: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Keys of config.json that are kept with their values, and why others are not."""
    kept: dict[str, Any] = {}
    left_out = {}
    for key in TOKEN_IDS:
        if key not in content:
            continue
        value = content[key]
        if not _names_tokens(key, value, vocab_size):
            left_out[key] = f"not a token of a vocabulary of {vocab_size:,}"
            value = None
        kept[key] = value
    for key, fits in _OTHER_KEYS.items():
        if key not in content:
            continue
        if fits(content[key]):
            kept[key] = content[key]
        else:
            left_out[key] = "a value of another type"
    return kept, left_out


def _names_tokens(key: str, value: object, vocab_size: int) -> bool:
    if value is None:
        return True
    several = isinstance(value, list) and key == "eos_token_id"
    ids = value if several and isinstance(value, list) else [value]
    return bool(ids) and all(type(one) is int and _NO_ID <= one < vocab_size for one in ids)


class _Found(NamedTuple):
    """A file that the folder has: its content, or why it is not kept."""

    name: str
    content: bytes | str


def _found_files(directory: Path, tokenizer: TokenizerOrigin) -> list[_Found]:
    """The small files that the folder has."""
    found = []
    for name in (GENERATION_NAME, *_TOKENIZER_FILES, *_VOCABULARY_FILES):
        try:
            content: bytes | str = read_bounded(directory / name, _MAX_FILE_BYTES)
        except FileNotFoundError:
            continue
        except OSError as error:
            content = reason(error)
        if isinstance(content, bytes):
            content = _why_not(name, content, tokenizer) or content
        found.append(_Found(name, content))
    if (directory / _TEMPLATES).is_dir():
        found.append(_Found(_TEMPLATES, "an export has no folders"))
    return found


def _why_not(name: str, content: bytes, tokenizer: TokenizerOrigin) -> str:
    """Why a file is not kept; empty when it is."""
    if name != GENERATION_NAME and tokenizer == "unknown":
        return f"there is no {TOKENIZER_NAME} to compare with that of the shards"
    if name in _VOCABULARY_FILES and tokenizer == "larger":
        return f"the {TOKENIZER_NAME} of the shards is not the model's"
    try:
        if name.endswith(".jinja"):
            content.decode("utf-8")
        elif name.endswith(".json"):
            _mapping(content)
    except UnicodeDecodeError:
        return "it is not UTF-8 text"
    except ValueError as error:
        return reason(error)
    return ""


def _mapping(content: bytes) -> dict[str, Any]:
    """A JSON file's mapping; a tokenizer_config.json has numbers past 64 bits (no limit: 1e30).

    Raises:
        ValueError: it is not one.
    """
    try:
        value = json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError("it is not a mapping")
    return value
