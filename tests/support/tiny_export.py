"""A tiny export folder."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from model.config import ModelConfig
from model.hugging_face.folder import ExportDescription
from pipeline.exporting.writing import write_export
from tests.support.tiny_model import tiny_config, tiny_weights

EOS = "<|endoftext|>"
VOCABULARY = 260  # 256 bytes, the end of text, and rows that no token uses


def byte_tokenizer() -> bytes:
    """The tokenizer.json of plain bytes: one id per byte, in the order of byte-level symbols."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(EOS, special=True)])
    return backend.to_str().encode()


def describe(config: ModelConfig, **changes: Any) -> ExportDescription:
    """A description of an export of this model."""
    facts: dict[str, Any] = {
        "model": config,
        "dtype": "fp32",
        "sequence_length": 64,
        "eos_token": EOS,
        "eos_id": 256,
        "run": "tiny",
        "step": 7,
    }
    return ExportDescription.model_validate(facts | changes)


def export_tiny(
    directory: Path, *, max_file_bytes: int = 10**9, dtype: str = "fp32", **sizes: Any
) -> dict[str, torch.Tensor]:
    """Write a tiny export; gives the weights in it."""
    config = tiny_config(vocab_size=VOCABULARY, **sizes)
    weights = tiny_weights(config)
    write_export(
        directory,
        describe(config, dtype=dtype),
        weights.items(),
        tokenizer=byte_tokenizer(),
        max_file_bytes=max_file_bytes,
    )
    return weights
