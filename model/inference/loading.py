"""Loads an export for decoding, straight from its safetensors files; and models that draft."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch

from foundation.bounded_files import read_bounded
from foundation.shown_text import reason
from model.config import ModelConfig
from model.errors import ConfigError, is_memory_shortage
from model.hugging_face.folder import TOKENIZER_NAME, ExportRecord
from model.hugging_face.identity import ending_tokens
from model.hugging_face.importing import LlamaFolder
from model.hugging_face.loading import DTYPES, TOKENIZER_BYTES, open_export
from model.inference.network import Network

# Below this, threads wait for one another longer than they compute, far longer on a busy machine.
_ONE_THREAD_PARAMETERS = 30_000_000


class LoadedNetwork(NamedTuple):
    """An export, ready to decode with.

    Attributes:
        network: trunk and all heads.
        tokenizer: encodes text that spells a special token as ordinary text.
        record: what the folder says of itself.
        eos_ids: tokens that end a text: the one that ended the documents it was trained on, and
            those at which transformers' generate() stops.
    """

    network: Network
    tokenizer: tokenizers.Tokenizer
    record: ExportRecord
    eos_ids: frozenset[int]


def load_network(
    directory: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    *,
    memory: bool = False,
) -> LoadedNetwork:
    """Load an export; megatron-core is not needed and no process group is made.

    Args:
        directory: the folder.
        dtype: to compute in; None = as stored.
        device: to compute on; None = the CPU.
        memory: take a model with a memory, too, which only `model.inference.memory_stream` runs.

    Raises:
        CheckpointError: a file, a head or a tensor is missing, or one is damaged.
        ConfigError: it has a memory and may not, or there is no memory for its weights.
    """
    with open_export(directory) as export:
        description = export.record.description
        if description.model.memory is not None and not memory:
            raise ConfigError(
                f"{directory} is a model with a memory, which python -m model.generate and "
                "pipeline.evaluate alone run; use these, or an export of a model without "
                "model.memory"
            )
        dtype = dtype or DTYPES[description.dtype]
        with _shortage_told(directory, description.model, dtype):
            network = Network.read(description.model, export.tensor, dtype, device)
    eos_ids = ending_tokens(directory, description.model.vocab_size) | {description.eos_id}
    return LoadedNetwork(network, export.tokenizer, export.record, frozenset(eos_ids))


def load_drafter(directory: Path, loaded: LoadedNetwork, positions: int = 0) -> Network:
    """Load head 1 of a second model, which drafts for a first one.

    Args:
        directory: an export, or another Llama as transformers saves it.
        loaded: the first model; it has the same tokenizer and vocabulary.
        positions: on which the second must have been trained, at least.

    Raises:
        ConfigError: it is no Llama, does not fit the first model, was trained on fewer, or has no
            room in memory.
        CheckpointError: a file or a tensor is missing, or one is damaged.
    """
    folder = LlamaFolder(directory)
    folder.verify()
    sizes, vocab_size = folder.sizes, loaded.record.description.model.vocab_size
    _check_tokenizer(directory, loaded.tokenizer)
    if sizes.vocab_size != vocab_size:
        raise ConfigError(
            f"--draft-model {directory} has a vocabulary of {sizes.vocab_size}, the model one of "
            f"{vocab_size}; they must be equal, give a draft model of the same family"
        )
    if sizes.positions is not None and sizes.positions < positions:
        raise ConfigError(
            f"--draft-model {directory} was trained on {sizes.positions} positions, and texts may "
            f"have {positions} here; give --max-model-len {sizes.positions}, or a draft model of "
            "more"
        )
    config = folder.next_token_config()
    folder.check(config)
    network = loaded.network
    with _shortage_told(directory, config, network.dtype):
        return Network.read(config, folder.tensor, network.dtype, network.device)


@contextlib.contextmanager
def _shortage_told(directory: Path, config: ModelConfig, dtype: torch.dtype) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_memory_shortage(error):
            raise
        size = config.num_parameters() * dtype.itemsize / 2**30
        raise ConfigError(
            f"{directory}: no memory for its weights, {size:.2g} GiB in {dtype}; give --dtype "
            "bf16, or a device or machine with more"
        ) from error


def _check_tokenizer(directory: Path, tokenizer: tokenizers.Tokenizer) -> None:
    path = directory / TOKENIZER_NAME
    try:
        theirs = tokenizers.Tokenizer.from_buffer(read_bounded(path, TOKENIZER_BYTES))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(
            f"--draft-model: {path} is not a readable tokenizer.json ({reason(error)}); put the "
            "tokenizer of the draft model there, to compare it with the model's"
        ) from error
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"--draft-model {directory} has another tokenizer than the model, so its drafts would "
            "be other texts; give a draft model with the same one"
        )


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
