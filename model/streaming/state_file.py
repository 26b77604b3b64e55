"""What a stream has left behind, in a file: written whole or not at all, read back checked."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from foundation.bounded_files import check_regular
from foundation.durable_files import write_whole
from foundation.shown_text import reason
from model.config import ModelConfig
from model.errors import CheckpointError, ConfigError
from model.inference.memory_stream import MemoryState

_FORMAT = "headway-memory-state"


def write_state(path: Path, state: MemoryState, config: ModelConfig) -> None:
    """Write a state, which streams of a model of the same sizes go on with.

    Raises:
        ConfigError: the file cannot be written.
    """
    tensors = {
        "memories": state.memories.cpu().contiguous(),
        "before": torch.tensor(state.before, dtype=torch.long),
        "segment": torch.tensor(state.segment, dtype=torch.long),
    }
    told = {"format": _FORMAT, "model": _sizes(config)}
    try:
        write_whole(path, save(tensors, metadata=told))
    except OSError as error:
        raise ConfigError(
            f"--save-memory {path} cannot be written ({error.strerror or error}); name another file"
        ) from error


def read_state(path: Path, config: ModelConfig) -> MemoryState:
    """Read a state that `write_state` wrote.

    Raises:
        CheckpointError: it is none, or is damaged.
        ConfigError: it is of a model of other sizes.
    """
    try:
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            told = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"--load-memory {path} cannot be read ({reason(error)}); give a file that "
            "--save-memory wrote"
        ) from error
    if told.get("format") != _FORMAT or found.keys() != set(MemoryState._fields):
        raise CheckpointError(
            f"--load-memory {path} holds no memory; give a file that --save-memory wrote"
        )
    if told.get("model") != _sizes(config):
        raise ConfigError(
            f"--load-memory {path} is of a model of other sizes; give a file that this model wrote"
        )
    if not _fits(found, config):
        raise CheckpointError(
            f"--load-memory {path} is damaged: its tensors are not those of a text; read the text "
            "again with --save-memory"
        )
    before, segment = (tuple(found[name].tolist()) for name in ("before", "segment"))
    return MemoryState(found["memories"], before, segment)


def _fits(found: Mapping[str, Tensor], config: ModelConfig) -> bool:
    """Whether shapes and ids are such as a stream leaves behind."""
    sizes = config.memory
    assert sizes is not None
    memories, before, segment = (found[name] for name in MemoryState._fields)
    tokens = [before, segment]
    return (
        memories.is_floating_point()
        and memories.dim() == 2
        and memories.shape[1] == config.hidden_size
        and len(memories) <= sizes.cache
        and bool(memories.isfinite().all())
        and all(ids.dtype == torch.long and ids.dim() == 1 for ids in tokens)
        and len(before) == (sizes.recent if len(memories) else 0)
        and len(segment) < sizes.segment
        and all(((ids >= 0) & (ids < config.vocab_size)).all() for ids in tokens)
    )


def _sizes(config: ModelConfig) -> str:
    """What a state depends on."""
    assert config.memory is not None
    memory = config.memory.model_dump(exclude={"bptt", "adapter_rank", "adapter_alpha"})
    sizes = {"hidden_size": config.hidden_size, "vocab_size": config.vocab_size}
    return json.dumps(sizes | memory, sort_keys=True)
