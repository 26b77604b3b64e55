"""Where decoding runs: the device and the number of threads, as commands choose them."""

import torch

from model.config import ModelConfig
from model.errors import ConfigError

DEVICES = ("auto", "cpu", "cuda")
# Below this, threads wait for one another longer than they compute, far longer on a busy machine.
_ONE_THREAD_PARAMETERS = 30_000_000


def choose_device(wanted: str) -> torch.device:
    """The device of an option `--device`, one of DEVICES.

    Raises:
        ConfigError: there is no such device.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda, but this process sees no CUDA device; check nvidia-smi and "
            "CUDA_VISIBLE_DEVICES or use --device cpu"
        )
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def limit_threads(config: ModelConfig, device: torch.device) -> None:
    """Let a small model on a CPU compute with one thread."""
    if device.type == "cpu" and config.num_parameters() < _ONE_THREAD_PARAMETERS:
        torch.set_num_threads(1)
