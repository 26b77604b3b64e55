"""Tensors of an export: those that transformers' classes expect, and equal to the checkpoint's.

Nothing is built: classes are on torch's meta device, tensors are read one at a time.
"""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from foundation.json_text import read_json
from model.errors import CheckpointError
from model.hugging_face.config import CONFIG_NAME, LINEAR_MODEL_TYPE
from model.hugging_face.folder import ALL_HEADS_INDEX_NAME, ExportDescription
from model.hugging_face.loading import DTYPES
from model.hugging_face.modeling_headway import (
    HeadwayConfig,
    HeadwayForCausalLM,
    HeadwayLinearForCausalLM,
)
from model.hugging_face.names import hf_names, split
from model.hugging_face.stored_tensors import MODEL_INDEX_NAME, StoredTensors
from model.structure.parameter_shapes import parameter_shapes
from pipeline.checkpoint.sharded_tensors import StateFiles

_CLASSES = ((LlamaForCausalLM, MODEL_INDEX_NAME), (HeadwayForCausalLM, ALL_HEADS_INDEX_NAME))
_LINEAR_CLASSES = ((HeadwayLinearForCausalLM, ALL_HEADS_INDEX_NAME),)


def check_names(folder: Path) -> None:
    """See to it that a plain Llama, and the class of all heads, would find just their tensors.

    With linear heads there is the latter alone.

    Raises:
        CheckpointError: an index or a file lacks a tensor, has another one, or one of another
            shape.
    """
    linear = read_json(folder / CONFIG_NAME)["model_type"] == LINEAR_MODEL_TYPE
    try:
        config = (HeadwayConfig if linear else LlamaConfig).from_pretrained(folder)
    except ValueError as error:
        raise CheckpointError(f"transformers refuses the written model: {error}") from error
    for kind, index in _LINEAR_CLASSES if linear else _CLASSES:
        with torch.device("meta"):
            model = kind(config)
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        found = StoredTensors(folder, index).shapes()
        wrong = sorted(
            f"{name} {_shape(found.get(name))} instead of {_shape(expected.get(name))}"
            for name in expected.keys() | found.keys()
            if expected.get(name) != found.get(name)
        )
        if wrong:
            raise CheckpointError(
                f"the written model is not what transformers' {kind.__name__} expects: "
                f"{'; '.join(wrong[:3])}; nothing was exported"
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(shape)


def check_values(folder: Path, description: ExportDescription, files: StateFiles) -> None:
    """See to it that every written tensor is the checkpoint's, rounded once, bit by bit.

    Args:
        folder: the export.
        description: what it is of.
        files: the checkpoint's weights.

    Raises:
        CheckpointError: naming the first tensor that is not.
    """
    config, dtype = description.model, DTYPES[description.dtype]
    tensors = StoredTensors(folder, ALL_HEADS_INDEX_NAME)
    for name in parameter_shapes(config):
        parts = split(name, files.whole("weight", name).to(dtype), config)
        for hf_name, part in zip(hf_names(name, config), parts, strict=True):
            found = tensors.whole(hf_name)
            if found.dtype != dtype or not torch.equal(found, part):
                raise CheckpointError(
                    f"tensor {hf_name} of the written model is not the checkpoint's {name} in "
                    f"{description.dtype}, or holds what is not a number; nothing was exported"
                )
