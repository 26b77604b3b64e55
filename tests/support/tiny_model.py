"""Tiny models with random weights, and plain decoding to compare with."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from model.hugging_face.loading import build_model
from model.hugging_face.names import hf_names, split
from model.inference.network import Network
from model.language_model import MultiTokenModel
from model.layers import Checkpointing
from model.structure.parameter_shapes import parameter_shapes
from model.structure.process_groups import ensure_single_process


def tiny_config(**changes: Any) -> ModelConfig:
    """Six layers, four of them heads, grouped queries; every size differs from the others."""
    sizes: dict[str, Any] = {
        "layers": 6,
        "hidden_size": 32,
        "attention_heads": 4,
        "kv_heads": 2,
        "ffn_hidden_size": 48,
        "vocab_size": 20,
        "future_tokens": 4,
    }
    return ModelConfig.model_validate(sizes | changes)


def tiny_weights(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Weights large enough for peaked predictions; norm weights are all different, too."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in parameter_shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        weights[name] = 1 + 0.1 * noise if len(shape) == 1 else 0.25 * noise
    return weights


def tiny_model(
    config: ModelConfig,
    weights: dict[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float64,
) -> MultiTokenModel:
    """A model on the CPU; in float64 no two logits are equal up to rounding."""
    return build_model(config, (weights or tiny_weights(config)).items(), dtype)


def tiny_network(
    config: ModelConfig,
    weights: dict[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Network:
    """The same model in the form that decoding uses."""
    stored = {
        hf_name: part
        for name, weight in (weights or tiny_weights(config)).items()
        for hf_name, part in zip(hf_names(name, config), split(name, weight, config), strict=True)
    }
    return Network.read(config, stored.__getitem__, dtype)


def training_model(
    activation_checkpointing: Checkpointing = "none",
    heads: int = 3,
    layers: int = 5,
    kv_heads: int = 2,
    **changes: Any,
) -> MultiTokenModel:
    """A tiny model in float64 in the state in which training has it; always the same weights."""
    ensure_single_process()
    config = tiny_config(layers=layers, future_tokens=heads, kv_heads=kv_heads, **changes)
    model = MultiTokenModel(
        config, dtype=torch.float64, activation_checkpointing=activation_checkpointing
    )
    with torch.no_grad():
        for name, weight in tiny_weights(config).items():
            model.get_parameter(name).copy_(weight)
    return model


@torch.no_grad()
def head_logits(model: MultiTokenModel, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
    """`[n, B, S, V]` logits of all heads from the forward that training runs, without a cache."""
    trunk_output = model(tokens, documents=documents)
    context = model.context(tokens.shape[1], tokens.device, documents)
    return model.all_logits(trunk_output, context).transpose(1, 2)


@torch.no_grad()
def greedy_continuation(
    model: MultiTokenModel, prompt: Sequence[int], num_tokens: int
) -> list[int]:
    """Plain greedy decoding with head 1: everything is recomputed for every token."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        inputs = torch.tensor([tokens])
        outputs = model.heads.outputs(model(inputs), model.context(len(tokens), inputs.device))
        hidden = next(hidden for head, hidden in outputs if head == 1)  # no other but it needs
        tokens.append(int(model.logits(hidden)[-1, 0].argmax()))
    return tokens[len(prompt) :]


@functools.cache
def tiny_prompts(vocab_size: int = 20) -> list[list[int]]:
    """Prompts of very different lengths."""
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randint(vocab_size, (length,), generator=generator).tolist()
        for length in (1, 5, 9, 3, 17)
    ]
