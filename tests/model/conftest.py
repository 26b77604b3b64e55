"""Settings for all tests of the model."""

from pathlib import Path

import pytest
import torch

from tests.support.tiny_export import export_tiny


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tensors here are so small that threads would only wait for one another."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny export with four heads, of a file's own."""
    directory = tmp_path_factory.mktemp("tiny") / "export"
    export_tiny(directory)
    return directory
