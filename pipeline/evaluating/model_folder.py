"""The model that is evaluated: an export with its heads, or any plain Llama."""

from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch

from foundation.shown_text import reason
from model.errors import CheckpointError, ConfigError
from model.hugging_face.config import first_token
from model.hugging_face.folder import RECORD_NAME, TOKENIZER_NAME
from model.hugging_face.identity import read_identity
from model.hugging_face.importing import LlamaFolder
from model.hugging_face.loading import DTYPES, load_tokenizer
from model.inference.loading import load_network
from model.inference.network import Network

_LONGEST_WINDOW = 8192


class EvaluatedModel(NamedTuple):
    """A model, ready to be evaluated.

    Attributes:
        directory: its folder.
        network: trunk and heads; a plain Llama has one.
        tokenizer: encodes text that spells a special token as ordinary text.
        begin: the token that begins a text; None = it has none.
        end: the token that ends one; None = it has none.
        positions: that it was trained on.
        joined: whether it was trained across the ends of documents.
    """

    directory: Path
    network: Network
    tokenizer: tokenizers.Tokenizer
    begin: int | None
    end: int | None
    positions: int
    joined: bool

    @property
    def window(self) -> int:
        """Tokens of a window unless another number is asked for."""
        return min(self.positions, _LONGEST_WINDOW)


def open_model(directory: Path, dtype: str | None, device: torch.device) -> EvaluatedModel:
    """Load a model.

    Args:
        directory: its folder, see `pipeline.evaluating.options.check_folder`.
        dtype: to compute in, `fp32` or `bf16`; None = as stored.
        device: to compute on.

    Raises:
        CheckpointError: it is no model, or damaged.
        ConfigError: it is not a model that can be run here.
    """
    wanted = DTYPES[dtype] if dtype else None
    # Without a record, but with heads: saved by transformers.
    if (directory / RECORD_NAME).is_file() or LlamaFolder(directory).heads > 1:
        loaded = load_network(directory, wanted, device, memory=True)
        description = loaded.record.description
        begin = first_token(directory, description.model.vocab_size)
        return _model(
            directory,
            loaded.network,
            loaded.tokenizer,
            begin=begin,
            end=description.eos_id,
            positions=description.sequence_length,
        )
    return _open_llama(directory, wanted, device)


def _open_llama(directory: Path, dtype: torch.dtype | None, device: torch.device) -> EvaluatedModel:
    folder = LlamaFolder(directory)
    sizes = folder.sizes
    config = folder.next_token_config()
    folder.check(config)
    if not (directory / TOKENIZER_NAME).is_file():
        raise CheckpointError(
            f"{directory} has no {TOKENIZER_NAME}; load its tokenizer with transformers and save "
            "it there by save_pretrained, which writes one"
        )
    tokenizer = load_tokenizer(directory, sizes.vocab_size)
    try:
        identity = read_identity(directory, vocab_size=sizes.vocab_size, tokenizer="same")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{directory}: its config.json cannot be read ({reason(error)}); give a whole model"
        ) from error
    ends = identity.token_ids("eos_token_id")
    end = ends[0] if isinstance(ends, list) and ends else ends
    stored = folder.tensor("model.norm.weight").dtype
    return _model(
        directory,
        Network.read(
            config,
            folder.tensor,
            dtype or (torch.bfloat16 if stored == torch.bfloat16 else torch.float32),
            device,
        ),
        tokenizer,
        begin=first_token(directory, sizes.vocab_size),
        end=end if type(end) is int and 0 <= end < sizes.vocab_size else None,
        positions=identity.positions,
    )


def _model(
    directory: Path,
    network: Network,
    tokenizer: tokenizers.Tokenizer,
    *,
    begin: int | None,
    end: int | None,
    positions: int,
) -> EvaluatedModel:
    # A text that begins with the end of another was trained to follow it.
    joined = begin is not None and begin == end
    return EvaluatedModel(directory, network, tokenizer, begin, end, positions, joined)
