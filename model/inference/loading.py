"""Loads an export for decoding, straight from its safetensors files."""

from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch

from model.hugging_face.folder import ExportRecord
from model.hugging_face.loading import DTYPES, open_export
from model.inference.network import Network


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
