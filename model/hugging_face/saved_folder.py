"""What a folder of a model with heads says of itself: an export, or one that transformers saved.

`HeadwayForCausalLM.save_pretrained` writes all heads into the files of the Llama, and a config.json
with their number; it has no `headway.json`, and so no checksums.
"""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from foundation.json_text import read_json
from foundation.shown_text import printable
from model.errors import CheckpointError
from model.hugging_face.config import (
    CONFIG_NAME,
    DEFAULT_POSITIONS,
    TOKEN_IDS,
    read_llama_config,
)
from model.hugging_face.folder import (
    ALL_HEADS_INDEX_NAME,
    RECORD_NAME,
    ExportDescription,
    ExportRecord,
    read_record,
)

_SETTINGS_NAME = "tokenizer_config.json"


def read_any_record(directory: Path) -> ExportRecord:
    """The record of an export; for a folder that transformers saved, one without files.

    Raises:
        CheckpointError: it is neither, or damaged.
        ConfigError: it was saved, and is no Llama.
    """
    config = _mapping(directory / CONFIG_NAME)
    heads = config.get("future_tokens")
    # An export's own index without its record: an export that has lost it.
    exported = any((directory / name).exists() for name in (RECORD_NAME, ALL_HEADS_INDEX_NAME))
    if exported or type(heads) is not int or heads < 2:
        return read_record(directory)
    path = directory / CONFIG_NAME
    sizes = read_llama_config(directory)
    eos = config.get("eos_token_id", TOKEN_IDS["eos_token_id"])
    eos_id = eos[0] if isinstance(eos, list) and eos else eos
    if type(eos_id) is not int:
        raise CheckpointError(
            f"{path} has no number for eos_token_id, so no text would end; write the id there that "
            "ends a text"
        )
    facts = {
        "model": sizes.model(heads),
        "dtype": "bf16" if _dtype(config) == "bfloat16" else "fp32",
        "sequence_length": config.get("max_position_embeddings", DEFAULT_POSITIONS),
        "eos_token": _eos_token(directory),
        "eos_id": eos_id,
        "run": directory.name,
        "step": 0,
    }
    try:
        description = ExportDescription.model_validate(facts)
    except ValidationError as error:
        fault = error.errors()[0]
        where = printable(".".join(map(str, fault["loc"])))
        raise CheckpointError(
            f"{path} is not of a model with {heads} heads ({where}: {printable(fault['msg'])}); "
            "save it again"
        ) from error
    return ExportRecord(future_tokens=heads, description=description, files={})


def _dtype(config: dict[str, Any]) -> object:
    """What transformers 5, or 4, says of the weights' type."""
    return config.get("dtype") or config.get("torch_dtype")


def _eos_token(directory: Path) -> str:
    """The name of the end of text as the tokenizer's settings have it; empty if they do not."""
    token = _mapping(directory / _SETTINGS_NAME).get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _mapping(path: Path) -> dict[str, Any]:
    """A JSON file's content; empty if there is none that can be read."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
