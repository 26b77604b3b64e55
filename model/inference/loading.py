"""Loads an export for decoding, straight from its safetensors files."""

from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch

from model.errors import ConfigError
from model.hugging_face.folder import ExportRecord
from model.hugging_face.loading import DTYPES, open_export
from model.inference.network import Network

# Below this, threads wait for one another longer than they compute, far longer on a busy machine.
_ONE_THREAD_PARAMETERS = 30_000_000


class LoadedNetwork(NamedTuple):
    """An export, ready to decode with.

    Attributes:
        network: trunk and all heads.
        tokenizer: encodes text that spells a special token as ordinary text.
        record: what the folder says of itself.
    """

    network: Network
    tokenizer: tokenizers.Tokenizer
    record: ExportRecord


def load_network(
    directory: Path, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> LoadedNetwork:
    """Load an export; megatron-core is not needed and no process group is made.

    Args:
        directory: the folder.
        dtype: to compute in; None = as stored.
        device: to compute on; None = the CPU.

    Raises:
        CheckpointError: a file, a head or a tensor is missing, or one is damaged.
    """
    with open_export(directory) as export:
        description = export.record.description
        network = Network.read(
            description.model, export.tensor, dtype or DTYPES[description.dtype], device
        )
    return LoadedNetwork(network, export.tokenizer, export.record)


def choose_device(wanted: str) -> torch.device:
    """The device that an option `--device auto|cpu|cuda` stands for.

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


def limit_threads(network: Network) -> None:
    """Let a small model decode on one thread of the CPU, from here to the end of the process."""
    small = network.config.num_parameters() < _ONE_THREAD_PARAMETERS
    if network.device.type == "cpu" and small:
        torch.set_num_threads(1)
