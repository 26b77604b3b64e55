"""A model with a memory in plain torch, one stream at a time: the equations, and nothing shared.

Legend: S tokens, H hidden, V vocabulary, n heads.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig


@dataclass
class Reading:
    """What a stream gives.

    Attributes:
        logits: by segment `[n, L, V]`.
        memories: `[H]` of each segment.
        prompts: `[H]` of each segment.
    """

    logits: list[Tensor] = field(default_factory=list)
    memories: list[Tensor] = field(default_factory=list)
    prompts: list[Tensor] = field(default_factory=list)


class PlainMemoryModel:
    """Parallel heads of one layer each, from weights under the model's own names."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor]) -> None:
        assert config.memory is not None
        self.config, self.sizes, self.weights = config, config.memory, weights

    def read(self, tokens: Tensor, depth: int | None = None, of: int | None = None) -> Reading:
        """Read a stream `[S]`, segment by segment.

        Args:
            tokens: ids.
            depth: with `of`, memories more than so many segments before segment `of` are values.
            of: number of a segment.
        """
        reading, sizes = Reading(), self.sizes
        for number, start in enumerate(range(0, len(tokens), sizes.segment)):
            segment = tokens[start : start + sizes.segment]
            before = tokens[max(0, start - sizes.segment) : start]
            prompt = self._prompt(segment, before, reading.memories[-sizes.cache :])
            sensory = before[len(before) - sizes.sensory :] if sizes.sensory else before[:0]
            parts = [prompt[None], self._embed(sensory), self._embed(segment), prompt[None]]
            output = self._trunk(torch.cat(parts))
            first = 1 + (sizes.sensory if number else 0)
            reading.logits.append(self._heads(output[first : first + len(segment)]))
            memory = output[first + len(segment)]
            if depth is not None and of is not None and number < of - depth:
                memory = memory.detach()
            reading.memories.append(memory)
            reading.prompts.append(prompt)
        return reading

    def _prompt(self, segment: Tensor, before: Tensor, memories: list[Tensor]) -> Tensor:
        initial = self.weights["memory.initial"][0]
        if not memories:
            return initial
        if not self.sizes.retrieval:
            return memories[-1]
        j = self.sizes.summary
        seen = before[-j:] if self.sizes.mode == "strict_prev" else segment[:j]
        asking = self.weights["memory.summary"]
        summary = self._trunk(torch.cat([asking, self._embed(seen), asking]))[-1]
        query = self.weights["memory.query"] @ summary
        keys = torch.stack(memories) @ self.weights["memory.key"].T
        return (keys @ query / math.sqrt(len(query))).softmax(0) @ torch.stack(memories)

    def _embed(self, tokens: Tensor) -> Tensor:
        return self.weights["trunk.embedding.weight"][tokens]

    def _trunk(self, hidden: Tensor) -> Tensor:
        for index in range(self.config.trunk_layers):
            hidden = self._layer(f"trunk.layers.{index}.block.", hidden)
        return hidden

    def _heads(self, trunk_output: Tensor) -> Tensor:
        outputs = [
            self._layer(f"heads.layers.{head}.block.", trunk_output)
            for head in range(1, self.config.future_tokens + 1)
        ]
        normed = self._norm(torch.stack(outputs), self.weights["heads.readout.norm_weight"])
        return normed @ self.weights["heads.readout.weight"].T

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(hidden, weight.shape, weight, self.config.norm_eps)

    def _layer(self, prefix: str, hidden: Tensor) -> Tensor:
        config, weights = self.config, self.weights
        length, dim, groups = len(hidden), config.head_dim, config.kv_heads
        per_group = config.attention_heads // groups
        normed = self._norm(hidden, weights[prefix + "input_layernorm.weight"])
        qkv = normed @ weights[prefix + "self_attention.linear_qkv.weight"].T
        qkv = qkv.view(length, groups, per_group + 2, dim)
        exponents = torch.arange(0, dim, 2).float() / dim  # angles are float32 in every model
        angles = torch.arange(length).float()[:, None] * (1.0 / config.rope_theta**exponents)
        query, key = (_rotate(part, angles) for part in (qkv[:, :, :-2], qkv[:, :, -2:-1]))
        scores = torch.einsum("sgrd,tgd->grst", query, key[:, :, 0]) / math.sqrt(dim)
        later = torch.ones(length, length).triu(1).bool()
        shares = scores.masked_fill(later, -torch.inf).softmax(-1)
        mixed = torch.einsum("grst,tgd->sgrd", shares, qkv[:, :, -1]).flatten(1)
        hidden = hidden + mixed @ weights[prefix + "self_attention.linear_proj.weight"].T
        normed = self._norm(hidden, weights[prefix + "pre_mlp_layernorm.weight"])
        gate, up = (normed @ weights[prefix + "mlp.linear_fc1.weight"].T).chunk(2, dim=-1)
        return hidden + (F.silu(gate) * up) @ weights[prefix + "mlp.linear_fc2.weight"].T


def _rotate(states: Tensor, angles: Tensor) -> Tensor:
    """Turn `[S, G, R, D]` by angles `[S, D / 2]`."""
    first, second = states.chunk(2, dim=-1)
    cosine, sine = angles.cos()[:, None, None], angles.sin()[:, None, None]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
