"""Loads an export into the model it was made from."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import tokenizers
import torch
from safetensors import SafetensorError
from torch import Tensor

from foundation.bounded_files import read_bounded
from foundation.shown_text import reason
from model.config import ModelConfig
from model.errors import CheckpointError
from model.hugging_face.folder import TOKENIZER_NAME, ExportRecord, verify_files
from model.hugging_face.importing import LlamaFolder
from model.hugging_face.names import hf_names, hf_shapes, join
from model.hugging_face.saved_folder import read_any_record
from model.hugging_face.stored_tensors import open_tensors
from model.structure.parameter_shapes import head_of, parameter_shapes

if TYPE_CHECKING:  # decoding reads exports, too, and need not wait for megatron-core
    from model.language_model import MultiTokenModel

TOKENIZER_BYTES = 1 << 30
_FLOATS = ("F32", "F16", "BF16")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class OpenExport(NamedTuple):
    """An export whose files were verified and are open.

    Attributes:
        record: what the folder says of itself.
        tokenizer: encodes text that spells a special token as ordinary text.
        tensor: reads a tensor, by its Hugging Face name; all of the model's are there, in their
            shapes.
    """

    record: ExportRecord
    tokenizer: tokenizers.Tokenizer
    tensor: Callable[[str], Tensor]


class LoadedExport(NamedTuple):
    """An export, ready for use.

    Attributes:
        model: with all its heads, in evaluation mode.
        tokenizer: encodes text that spells a special token as ordinary text.
        record: what the folder says of itself.
    """

    model: "MultiTokenModel"
    tokenizer: tokenizers.Tokenizer
    record: ExportRecord


def load_export(directory: Path, dtype: torch.dtype | None = None) -> LoadedExport:
    """Load an export on the CPU, in a world of one process.

    Args:
        directory: the folder.
        dtype: of the weights in memory; None = as stored.

    Raises:
        CheckpointError: a file, a head or a tensor is missing, or one is damaged.
    """
    with open_export(directory) as export:
        description = export.record.description
        weights = _parameters(description.model, export.tensor)
        model = build_model(description.model, weights, dtype or DTYPES[description.dtype])
    return LoadedExport(model, export.tokenizer, export.record)


@contextmanager
def open_export(directory: Path) -> Iterator[OpenExport]:
    """Verify an export and open its files; or a folder that transformers saved, all heads in it.

    Raises:
        CheckpointError: a file, a head or a tensor is missing, or one is damaged.
        ConfigError: it was saved by transformers, and its sizes are not those of its config.json.
    """
    record = read_any_record(directory)
    verify_files(directory, record)
    config = record.description.model
    tokenizer = load_tokenizer(directory, config.vocab_size)
    if not record.files:
        yield OpenExport(record, tokenizer, _saved_tensors(directory, config))
        return
    with ExitStack() as stack:
        files = _open_tensors(directory, record, stack)
        _check_shapes(directory, config, files)  # before room is made for what they may not be
        yield OpenExport(record, tokenizer, lambda name: files[name].get_tensor(name))


def build_model(
    config: ModelConfig, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> "MultiTokenModel":
    """A model in evaluation mode on the CPU, with every parameter from `weights`."""
    from model.language_model import MultiTokenModel
    from model.structure.process_groups import ensure_single_process

    ensure_single_process()
    model = MultiTokenModel(config, dtype=dtype).to(dtype).eval().requires_grad_(False)
    parameters = dict(model.named_parameters())
    for name, tensor in weights:
        parameters.pop(name).copy_(tensor)
    assert not parameters, list(parameters)
    return model


def _saved_tensors(directory: Path, config: ModelConfig) -> Callable[[str], Tensor]:
    """Reads the tensors of a folder that transformers saved, once all are known to be there."""
    folder = LlamaFolder(directory)
    if not all(folder.holds(name, config) for name in parameter_shapes(config)):
        raise CheckpointError(
            f"{directory} has {folder.heads} of the {config.future_tokens} heads that its "
            "config.json names; load the model with trust_remote_code=True before it is saved"
        )
    folder.check(config)
    return folder.tensor


def load_tokenizer(directory: Path, vocab_size: int) -> tokenizers.Tokenizer:
    """The tokenizer of an export or of a Llama's folder.

    Raises:
        CheckpointError: there is none, or it gives ids that the model does not have.
    """
    path = directory / TOKENIZER_NAME
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(read_bounded(path, TOKENIZER_BYTES))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(
            f"{path} is not a tokenizer.json ({reason(error)}); export again"
        ) from error
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= vocab_size:
        raise CheckpointError(
            f"{path} gives ids up to {largest}, the model has {vocab_size} tokens; "
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
            file = stack.enter_context(open_tensors(directory / file_name))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{directory / file_name} is damaged ({reason(error)}); export again"
            ) from error
        files |= dict.fromkeys(file.keys(), file)
    return files


def _check_shapes(directory: Path, config: ModelConfig, files: dict[str, Any]) -> None:
    """See that every tensor of the model is stored, in its shape.

    Raises:
        CheckpointError: naming the first that is not.
    """
    for name, shape in parameter_shapes(config).items():
        names = hf_names(name, config)
        for hf_name, hf_shape in zip(names, hf_shapes(name, shape, config), strict=True):
            if hf_name not in files:
                raise CheckpointError(
                    f"{directory}: tensor {hf_name}{_which_head(name)} is missing; export again"
                )
            stored = files[hf_name].get_slice(hf_name)
            if tuple(stored.get_shape()) != hf_shape or stored.get_dtype() not in _FLOATS:
                raise CheckpointError(
                    f"{directory}: tensor {hf_name} has shape {tuple(stored.get_shape())} of "
                    f"{stored.get_dtype()}, the model's sizes give {hf_shape}; export again"
                )


def _parameters(
    config: ModelConfig, tensor: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    for name in parameter_shapes(config):
        parts = [tensor(hf_name) for hf_name in hf_names(name, config)]
        yield name, join(name, parts, config)


def _which_head(name: str) -> str:
    head = head_of(name)
    return f" of head {head}" if head else ""
