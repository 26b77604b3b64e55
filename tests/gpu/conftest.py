"""Tests for a machine with a GPU; without one they are skipped.

`HEADWAY_TEST_DEVICE=cpu python -m pytest tests/gpu` tries them on a CPU, in small sizes: it shows
that they are written right, not that a GPU is.
"""

import os

import pytest
import torch

from tests.pipeline.conftest import config, shards
from tests.support.device_engine import TEST_DEVICE

__all__ = ["config", "shards"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """What is tested."""
    if TEST_DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip(
            "no CUDA device is visible (HEADWAY_TEST_DEVICE=cpu tries these tests on a CPU)"
        )
    if TEST_DEVICE == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    return torch.device("cuda", 0) if TEST_DEVICE == "cuda" else torch.device("cpu")
