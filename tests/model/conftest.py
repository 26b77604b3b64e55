"""Settings for all tests of the model."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tensors here are so small that threads would only wait for one another."""
    torch.set_num_threads(1)
