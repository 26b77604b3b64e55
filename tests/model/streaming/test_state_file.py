"""The file of what a stream has left behind: whole and of this model, or refused in one line."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import ModelConfig
from model.errors import CheckpointError, ConfigError
from model.inference.memory_stream import MemoryState, MemoryStream
from model.streaming.state_file import read_state, write_state
from tests.support.tiny_model import tiny_config, tiny_network

SIZES: dict[str, Any] = {"segment": 6, "summary": 4, "sensory": 2, "cache": 3, "width": 8}


def _config(**changes: Any) -> ModelConfig:
    return tiny_config(layers=5, future_tokens=3, memory=SIZES | changes)


def _state(length: int) -> MemoryState:
    stream = MemoryStream(tiny_network(_config()))
    if length:
        stream.feed(list(range(length)))
    return stream.state


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of a text of two segments and a half."""
    write_state(tmp_path / "state.safetensors", _state(15), _config())
    return tmp_path / "state.safetensors"


@pytest.mark.parametrize("length", [0, 1, 6, 15, 19])
def test_a_state_comes_back(tmp_path: Path, length: int) -> None:
    """To the bit, wherever the text stopped."""
    state = _state(length)
    write_state(tmp_path / "state", state, _config())
    found = read_state(tmp_path / "state", _config())
    assert torch.equal(found.memories, state.memories)
    assert found[1:] == state[1:]


def test_a_file_that_is_cut_is_refused(path: Path) -> None:
    """At any place."""
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"--load-memory .* cannot be read"):
            read_state(path, _config())


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """A folder, and nothing."""
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_state(path, _config())


def test_another_models_file_is_refused(path: Path, tmp_path: Path) -> None:
    """Of other sizes; and any file of tensors."""
    with pytest.raises(ConfigError, match="of a model of other sizes"):
        read_state(path, _config(cache=4))
    save_file({"memories": torch.zeros(2, 32)}, tmp_path / "other")
    with pytest.raises(CheckpointError, match="holds no memory"):
        read_state(tmp_path / "other", _config())


@pytest.mark.parametrize(
    "changed",
    [
        {"memories": torch.zeros(2, 31, dtype=torch.float64)},
        {"memories": torch.zeros(4, 32, dtype=torch.float64)},
        {"memories": torch.zeros(2, 32, dtype=torch.long)},
        {"memories": torch.zeros(0, 32, dtype=torch.float64)},
        {"memories": torch.full((2, 32), float("nan"), dtype=torch.float64)},
        {"before": torch.tensor([[1, 2, 3, 4]])},
        {"before": torch.tensor([1, 2, 3])},
        {"segment": torch.tensor([1, 2, 20])},
        {"segment": torch.tensor([-1])},
        {"segment": torch.tensor([1.0])},
        {"segment": torch.arange(6)},
    ],
)
def test_tensors_that_no_text_leaves_are_refused(path: Path, changed: dict[str, Tensor]) -> None:
    """Shapes, types, numbers and ids."""
    with safe_open(path, framework="pt") as file:
        told = file.metadata()
    save_file(load_file(path) | changed, path, metadata=told)
    with pytest.raises(CheckpointError, match="is damaged: its tensors are not those of a text"):
        read_state(path, _config())


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """In one line."""
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--save-memory .* cannot be written"):
        write_state(tmp_path / "file" / "state", _state(1), _config())
