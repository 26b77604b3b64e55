"""A model or a draft model for whose weights there is no memory is named."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.errors import ConfigError
from model.inference.loading import load_drafter, load_network
from model.inference.network import Network
from tests.support.tiny_export import export_tiny


@pytest.mark.parametrize("allocate", [torch.empty, bytearray])
def test_no_memory_for_weights_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allocate: Callable[[int], object]
) -> None:
    """Whoever allocates."""
    model, draft = tmp_path / "model", tmp_path / "draft"
    for directory in (model, draft):
        export_tiny(directory, ffn_hidden_size=20_000)
    loaded = load_network(model)
    monkeypatch.setattr(Network, "read", lambda *_: allocate(1 << 60))
    text = "no memory for its weights, 0.043 GiB in torch.float32; give --dtype"
    with pytest.raises(ConfigError, match=re.escape(f"{model}: {text}")):
        load_network(model)
    text = text.replace("0.043", "0.022")  # three layers of six
    with pytest.raises(ConfigError, match=re.escape(f"{draft}: {text}")):
        load_drafter(draft, loaded)
