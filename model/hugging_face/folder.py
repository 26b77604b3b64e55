"""The export format: a plain Hugging Face Llama with the extra heads in files of their own.

    config.json, generation_config.json   a LlamaForCausalLM of L - n + 1 layers
    model.safetensors                     trunk and head 1 (several files past 5 GB)
    model.safetensors.index.json          which file holds which of their tensors
    extra_heads.safetensors               heads 2 .. n, likewise; absent when n = 1
    all_heads.safetensors.index.json      the files of all tensors, for the class below
    modeling_headway.py                   a class for transformers with all heads
    tokenizer.json, tokenizer_config.json
    special_tokens_map.json, ...          of an imported model, as they were (`identity.py`)
    early_exit.json                       of an adapter, which model it drafts for (`early_exit.py`)
    acceptance.json                       how often the heads agree (`acceptance.py`); may be absent
    README.md                             the model card
    headway.json                          sizes, heads, run, and all files with checksums

Whatever reads Llama models reads the folder as one and leaves the extra heads alone; with
`trust_remote_code=True` transformers takes the class that has them. This file defines the record
and reads and checks it; `pipeline.exporting` writes the folder.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from foundation.bounded_files import is_name_inside, read_bounded
from foundation.durable_files import FileEntry, read_entry
from foundation.shown_text import printable
from model.config import ModelConfig
from model.errors import CheckpointError

RECORD_NAME = "headway.json"
ALL_HEADS_INDEX_NAME = "all_heads.safetensors.index.json"
CARD_NAME = "README.md"
TOKENIZER_NAME = "tokenizer.json"
FORMAT: Literal["headway-export"] = "headway-export"

# How the record spells the fields of an entry.
_FIELDS = {"bytes": "size", "xxh3_128": "xxh3"}


def _by_field(stored: object) -> object:
    if isinstance(stored, dict):
        return {_FIELDS.get(key, key): value for key, value in stored.items()}
    return stored


def _as_stored(entry: FileEntry) -> dict[str, int | str]:
    return {"bytes": entry.size, "xxh3_128": entry.xxh3}


StoredEntry = Annotated[FileEntry, BeforeValidator(_by_field), PlainSerializer(_as_stored)]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ExportDescription(_Entry):
    """What an export is of.

    Attributes:
        model: sizes, the number of heads among them.
        dtype: of the stored weights.
        sequence_length: positions that the model was trained on, here or before it was imported.
        eos_token: name of the token that ended the documents it was trained on here.
        eos_id: its id.
        run: name of the run that trained it.
        step: optimizer steps it was trained for.
    """

    model: ModelConfig
    dtype: Literal["fp32", "bf16"]
    sequence_length: int = Field(gt=0, lt=2**63)
    eos_token: str
    eos_id: int = Field(ge=0, lt=2**32)
    run: str
    step: int = Field(ge=0, lt=2**63)


class ExportRecord(_Entry):
    """headway.json; written last, so that its presence means a whole folder.

    Attributes:
        future_tokens: number of heads that the folder holds.
        description: what the export is of.
        files: every other file by name, without the model card, which is there to be edited.
    """

    format: Literal["headway-export"] = FORMAT
    version: Literal[1] = 1
    future_tokens: int
    description: ExportDescription
    files: dict[str, StoredEntry]

    @model_validator(mode="after")
    def _is_of_one_folder(self) -> Self:
        if self.future_tokens != self.description.model.future_tokens:
            raise ValueError("future_tokens is not that of the model")
        if not all("/" not in name and is_name_inside(name) for name in self.files):
            raise ValueError("a file's name leads out of the folder")
        return self


def read_record(directory: Path) -> ExportRecord:
    """What an export says of itself.

    Raises:
        CheckpointError: no such folder, not an export, or its record is damaged.
    """
    path = directory / RECORD_NAME
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} is not a folder; give one that python -m pipeline.export has written"
        )
    try:
        return ExportRecord.model_validate_json(read_bounded(path))
    except OSError as error:
        raise CheckpointError(
            f"{directory} has no readable {RECORD_NAME} ({error.strerror}), so it is not an export "
            "with its heads; give a folder that python -m pipeline.export has written"
        ) from error
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        problem = f"{printable(where)}: {printable(fault['msg'])}"
        raise CheckpointError(f"{path} is damaged ({problem}); export again") from error


def verify_files(directory: Path, record: ExportRecord) -> None:
    """Check that every file is there, with its size and its checksum.

    Raises:
        CheckpointError: naming the first file that is not.
    """
    for name, entry in record.files.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; export again")
        if (size := path.stat().st_size) != entry.size:
            raise CheckpointError(
                f"{path} has {size} bytes, {RECORD_NAME} says {entry.size}; export again"
            )
        if read_entry(path, from_disk=False) != entry:
            raise CheckpointError(
                f"{path} is damaged: its checksum is not the one in {RECORD_NAME}; export again"
            )
