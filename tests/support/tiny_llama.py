"""Tiny models of transformers' own Llama, saved as it saves them."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from model.config import ModelConfig
from model.hugging_face.importing import ImportedWeights, LlamaFolder, NewHeads
from model.hugging_face.loading import build_model
from model.language_model import MultiTokenModel
from model.structure.initialization import initial_weight
from model.structure.parameter_shapes import parameter_shapes

LAYERS, VOCABULARY = 4, 260
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def save_llama(
    directory: Path,
    *,
    rope: dict[str, Any] | None = None,
    shard_size: str = "5GB",
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> LlamaForCausalLM:
    """Make a Llama of four layers with grouped queries, save it and give it."""
    parameters = {"rope_type": "default"} if rope is None else rope
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 2e-5,
        "rope_parameters": {"rope_theta": 500.0, **parameters},
        "initializer_range": 0.2,
    }
    torch.manual_seed(1)
    llama = LlamaForCausalLM(LlamaConfig(**settings | changes)).to(dtype).eval()
    for name, parameter in llama.named_parameters():
        if "norm" in name:  # all ones would not tell one from another
            parameter.data += 0.1 * torch.randn_like(parameter)
    llama.save_pretrained(directory, max_shard_size=shard_size)
    return llama


def fitting_config(directory: Path, future_tokens: int, **changes: Any) -> ModelConfig:
    """The configuration of a run that begins with the folder's weights."""
    folder = LlamaFolder(directory)
    return ModelConfig.model_validate(
        {
            **folder.sizes.keys,
            "layers": folder.sizes.layers - 1 + future_tokens,
            "vocab_size": folder.sizes.vocab_size,
            "future_tokens": future_tokens,
            **changes,
        }
    )


def imported_model(
    directory: Path,
    config: ModelConfig,
    *,
    new_heads: NewHeads = "copy",
    dtype: torch.dtype = torch.float32,
) -> MultiTokenModel:
    """What a run of one process begins with."""
    folder = LlamaFolder(directory)
    folder.check(config)
    source = ImportedWeights(folder, config, new_heads=new_heads)
    weights = {
        name: source(name, lambda name=name, shape=shape: fresh(name, shape, config))  # type: ignore[misc]
        for name, shape in parameter_shapes(config).items()
    }
    return build_model(config, weights.items(), dtype)


def fresh(name: str, shape: tuple[int, ...], config: ModelConfig) -> torch.Tensor:
    """The value that an untrained model begins with."""
    return initial_weight(
        name, torch.Size(shape), seed=5, std=config.init_std, num_layers=config.layers
    )
