"""Writes what an export folder holds; it gets its name when whole and checked."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

import model.hugging_face
from foundation.durable_files import read_entry
from model.hugging_face.config import (
    CONFIG_NAME,
    HEAD_KEYS,
    LINEAR_MODEL_TYPE,
    llama_config,
)
from model.hugging_face.folder import (
    CARD_NAME,
    RECORD_NAME,
    ExportDescription,
    ExportRecord,
)
from model.hugging_face.loading import DTYPES
from model.hugging_face.names import hf_names, hf_shapes, split
from model.structure.parameter_shapes import checked_parameters, parameter_shapes
from pipeline.exporting.identity import Identity, own_identity
from pipeline.exporting.target import written_aside
from pipeline.exporting.weight_files import WeightFiles

MAX_FILE_BYTES = 5_000_000_000

_CODE = Path(model.hugging_face.__path__[0], "modeling_headway.py")
_CLASS, _LINEAR_CLASS = "HeadwayForCausalLM", "HeadwayLinearForCausalLM"
_HF_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def write_export(
    directory: Path,
    description: ExportDescription,
    weights: Iterable[tuple[str, Tensor]],
    *,
    tokenizer: bytes,
    identity: Identity | None = None,
    card: str = "",
    add: Callable[[Path], None] | None = None,
    check: Callable[[Path], None] | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write the folder; it appears under its name only when whole and checked.

    Args:
        directory: where to; an earlier export there is replaced.
        description: what the export is of.
        weights: whole parameters under our names, in any order; held one at a time.
        tokenizer: content of the shards' tokenizer.json.
        identity: what it says beside its weights; None = what a model trained from nothing does.
        card: the model card; left out when empty.
        add: called with the folder before its record is written; may add files.
        check: called with the finished folder before it gets its name; raises to refuse it.
        max_file_bytes: the model is spread over files of about this size.

    Raises:
        CheckpointError: parameters are missing, unknown or of wrong shape; the target may not be
            replaced; or writing failed. The target is then as it was.
    """
    with written_aside(directory) as folder:
        _write_weights(folder, description, weights, max_file_bytes)
        identity = identity or own_identity(description, tokenizer)
        settings = hf_config(description) | identity.config
        (folder / CONFIG_NAME).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
        for name, content in identity.files.items():
            (folder / name).write_bytes(content)
        if description.model.memory is None:
            (folder / _CODE.name).write_bytes(_CODE.read_bytes())
        if card:
            (folder / CARD_NAME).write_text(card, "utf-8")
        if add is not None:
            add(folder)
        write_record(folder, description)
        if check is not None:
            check(folder)


def hf_config(description: ExportDescription) -> dict[str, Any]:
    """`config.json`, but for what concerns tokens."""
    config = description.model
    weights = None
    if config.head_weights is not None:
        weights = config.loss_weights(max(description.step - 1, 0))
    kind = {
        key: getattr(config, key)
        for key, values in HEAD_KEYS.items()
        if getattr(config, key) != values[0]
    }
    written = llama_config(
        config,
        sequence_length=description.sequence_length,
        dtype=_HF_DTYPES[description.dtype],
    ) | {
        "future_tokens": config.future_tokens,
        **({} if weights is None else {"head_weights": list(weights)}),
        **kind,
        "auto_map": {"AutoModelForCausalLM": f"{_CODE.stem}.{_CLASS}"},
    }
    if config.head_kind == "linear":  # no Llama, and nothing shall take it for one
        written |= {
            "architectures": [_LINEAR_CLASS],
            "model_type": LINEAR_MODEL_TYPE,
            "auto_map": {
                "AutoConfig": f"{_CODE.stem}.HeadwayConfig",
                "AutoModelForCausalLM": f"{_CODE.stem}.{_LINEAR_CLASS}",
            },
        }
    if config.memory is not None:  # likewise, and no class of transformers runs it
        written |= {
            "architectures": ["HeadwayMemory"],
            "model_type": LINEAR_MODEL_TYPE,
            "memory": config.memory.model_dump(mode="json"),
        }
        del written["auto_map"]
    return written


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


def write_record(directory: Path, description: ExportDescription) -> None:
    """Write headway.json over all files that lie in the folder now, without the model card."""
    paths = [path for path in sorted(directory.iterdir()) if path.name != CARD_NAME]
    files = {path.name: read_entry(path, from_disk=False) for path in paths}
    record = ExportRecord(
        future_tokens=description.model.future_tokens, description=description, files=files
    )
    (directory / RECORD_NAME).write_text(record.model_dump_json(indent=1) + "\n", "utf-8")
