"""The export format: a plain Hugging Face Llama, with the extra heads beside it.

    config.json, generation_config.json   a LlamaForCausalLM of L - n + 1 layers
    model.safetensors                     trunk and head 1 (several files past 5 GB)
    model.safetensors.index.json          which file holds which of their tensors
    extra_heads.safetensors               heads 2 .. n, likewise; absent when n = 1
    all_heads.safetensors.index.json      the files of all tensors, for the class below
    modeling_headway.py                   a class for transformers with all heads
    tokenizer.json, tokenizer_config.json
    README.md                             the model card
    headway.json                          sizes, heads, source, and all files with checksums

Whatever reads Llama models reads the folder as one and leaves the extra heads alone; with
`trust_remote_code=True` transformers takes the class that has them.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.config import ModelConfig
from model.errors import CheckpointError
from model.hugging_face.export_folder import (
    CARD_NAME,
    ExportDescription,
    ExportRecord,
    read_record,
    verify_files,
    write_record,
    written_aside,
)
from model.hugging_face.hf_config import CONFIG_NAME, llama_config
from model.hugging_face.hf_files import WeightFiles
from model.hugging_face.hf_names import hf_names, hf_shapes, join, split
from model.language_model import MultiTokenModel
from model.parameter_shapes import checked_parameters, head_of, parameter_shapes
from model.process_groups import ensure_single_process

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MAX_FILE_BYTES = 5_000_000_000
TOKENIZER_NAME = "tokenizer.json"

_CODE = Path(__file__).with_name("modeling_headway.py")
_CLASS = f"{_CODE.stem}.HeadwayForCausalLM"
_HF_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


class LoadedExport(NamedTuple):
    """An export, ready for use.

    Attributes:
        model: with all its heads, in evaluation mode.
        tokenizer: encodes text that spells a special token as ordinary text.
        record: what the folder says of itself.
    """

    model: MultiTokenModel
    tokenizer: tokenizers.Tokenizer
    record: ExportRecord


def write_export(
    directory: Path,
    description: ExportDescription,
    weights: Iterable[tuple[str, Tensor]],
    *,
    tokenizer: bytes,
    card: str = "",
    check: Callable[[Path], None] | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write the folder; it appears under its name only when whole and checked.

    Args:
        directory: where to; an earlier export there is replaced.
        description: what the export is of.
        weights: whole parameters under our names, in any order; held one at a time.
        tokenizer: content of tokenizer.json.
        card: the model card; left out when empty.
        check: called with the finished folder before it gets its name; raises to refuse it.
        max_file_bytes: the model is spread over files of about this size.

    Raises:
        CheckpointError: parameters are missing, unknown or of wrong shape; the target may not be
            replaced; or writing failed. The target is then as it was.
    """
    with written_aside(directory) as folder:
        _write_weights(folder, description, weights, max_file_bytes)
        for name, content in hf_settings(description).items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        (folder / TOKENIZER_NAME).write_bytes(tokenizer)
        (folder / _CODE.name).write_bytes(_CODE.read_bytes())
        if card:
            (folder / CARD_NAME).write_text(card, "utf-8")
        write_record(folder, description)
        if check is not None:
            check(folder)


def hf_settings(description: ExportDescription) -> dict[str, dict[str, Any]]:
    """The JSON files that `transformers` reads, by name.

    Documents were separated by the end-of-text token, so it also is what text begins with.
    """
    model, eos_id = description.model, description.eos_id
    return {
        CONFIG_NAME: llama_config(
            model,
            sequence_length=description.sequence_length,
            dtype=_HF_DTYPES[description.dtype],
        )
        | {
            "bos_token_id": eos_id,
            "eos_token_id": eos_id,
            "future_tokens": model.future_tokens,
            "auto_map": {"AutoModelForCausalLM": _CLASS},
        },
        "generation_config.json": {"bos_token_id": eos_id, "eos_token_id": eos_id},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": description.eos_token,
            "eos_token": description.eos_token,
            "model_max_length": description.sequence_length,
            "clean_up_tokenization_spaces": False,
        },
    }


def load_export(directory: Path, dtype: torch.dtype | None = None) -> LoadedExport:
    """Load an export on the CPU, in a world of one process.

    Args:
        directory: the folder.
        dtype: of the weights in memory; None = as stored.

    Raises:
        CheckpointError: a file, a head or a tensor is missing, or one is damaged.
    """
    record = read_record(directory)
    verify_files(directory, record)
    config = record.description.model
    tokenizer = _load_tokenizer(directory, config)
    with ExitStack() as stack:
        tensors = _open_tensors(directory, record, stack)
        weights = _our_parameters(directory, config, tensors)
        model = build_model(config, weights, dtype or DTYPES[record.description.dtype])
    return LoadedExport(model, tokenizer, record)


def build_model(
    config: ModelConfig, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> MultiTokenModel:
    """A model in evaluation mode on the CPU, with every parameter from `weights`."""
    ensure_single_process()
    model = MultiTokenModel(config, dtype=dtype).to(dtype).eval().requires_grad_(False)
    parameters = dict(model.named_parameters())
    for name, tensor in weights:
        parameters.pop(name).copy_(tensor)
    assert not parameters, list(parameters)
    return model


def _write_weights(
    folder: Path,
    description: ExportDescription,
    weights: Iterable[tuple[str, Tensor]],
    max_file_bytes: int,
) -> None:
    config, dtype = description.model, DTYPES[description.dtype]
    shapes = {
        hf_name: hf_shape
        for name, shape in parameter_shapes(config).items()
        for hf_name, hf_shape in zip(
            hf_names(name, config), hf_shapes(name, shape, config), strict=True
        )
    }
    files = WeightFiles(folder, shapes, dtype, max_file_bytes)
    for name, tensor in checked_parameters(weights, config, folder):
        parts = split(name, tensor.to(dtype), config)
        for hf_name, part in zip(hf_names(name, config), parts, strict=True):
            files.add(hf_name, part)
    files.close()


def _load_tokenizer(directory: Path, config: ModelConfig) -> tokenizers.Tokenizer:
    path = directory / TOKENIZER_NAME
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path} is not a tokenizer.json ({error}); export again") from error
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if largest >= config.vocab_size:
        raise CheckpointError(
            f"{path} gives ids up to {largest}, the model has {config.vocab_size} tokens; "
            "put the tokenizer that the model was trained with there and export again"
        )
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _open_tensors(directory: Path, record: ExportRecord, stack: ExitStack) -> dict[str, Any]:
    """The open file that holds each tensor, by the tensor's name."""
    files: dict[str, Any] = {}
    for file_name in record.files:
        if not file_name.endswith(".safetensors"):
            continue
        try:
            file = stack.enter_context(safe_open(directory / file_name, framework="pt"))
        except SafetensorError as error:
            raise CheckpointError(
                f"{directory / file_name} is damaged ({error}); export again"
            ) from error
        files |= dict.fromkeys(file.keys(), file)
    return files


def _our_parameters(
    directory: Path, config: ModelConfig, files: dict[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    for name, shape in parameter_shapes(config).items():
        names = hf_names(name, config)
        parts = []
        for hf_name, hf_shape in zip(names, hf_shapes(name, shape, config), strict=True):
            if hf_name not in files:
                raise CheckpointError(
                    f"{directory}: tensor {hf_name}{_which_head(name)} is missing; export again"
                )
            part = files[hf_name].get_tensor(hf_name)
            if tuple(part.shape) != hf_shape:
                raise CheckpointError(
                    f"{directory}: tensor {hf_name} has shape {tuple(part.shape)}, the model's "
                    f"sizes give {hf_shape}; export again"
                )
            parts.append(part)
        yield name, join(name, parts, config)


def _which_head(name: str) -> str:
    head = head_of(name)
    return f" of head {head}" if head else ""
