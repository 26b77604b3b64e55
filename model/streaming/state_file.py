"""What a stream has left behind, in a file: written whole or not at all, read back checked."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

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
    before, segment = (tuple(found[name].tolist()) for name in ("before", "segment"))
    return MemoryState(found["memories"], before, segment)


def _sizes(config: ModelConfig) -> str:
    """What a state depends on."""
    assert config.memory is not None
    memory = config.memory.model_dump(exclude={"bptt"})
    sizes = {"hidden_size": config.hidden_size, "vocab_size": config.vocab_size}
    return json.dumps(sizes | memory, sort_keys=True)
