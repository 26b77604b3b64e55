"""The same model as one would write it in plain PyTorch: whole logits, one loss, one backward.

A Llama trunk, n heads of one layer each, one final norm and unembedding; torch's own attention,
RMSNorm and cross-entropy. No line of it comes from the packages of this project.

Legend: B batch, S sequence, H hidden, A attention heads, D head dimension, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainLayer(nn.Module):
    """Attention and SwiGLU, with a norm before each."""

    def __init__(self, hidden: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.gate_up = nn.Linear(hidden, 2 * ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`[B, S, H]` to `[B, S, H]`."""
        batch, length, hidden = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(
            _rotate(q, cos, sin), _rotate(k, cos, sin), v, is_causal=True
        )
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, hidden))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class PlainModel(nn.Module):
    """Trunk and n heads; `forward` gives the sum of the heads' mean losses."""

    def __init__(
        self, *, trunk_layers: int, future_tokens: int, hidden: int, ffn: int, vocabulary: int
    ) -> None:
        super().__init__()
        attention_heads = hidden // 64
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.trunk = nn.ModuleList(
            PlainLayer(hidden, attention_heads, ffn) for _ in range(trunk_layers)
        )
        self.heads = nn.ModuleList(
            PlainLayer(hidden, attention_heads, ffn) for _ in range(future_tokens)
        )
        self.norm = nn.RMSNorm(hidden)
        self.unembedding = nn.Linear(hidden, vocabulary, bias=False)
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)

    def compile_parts(self) -> None:
        """Layers, which share their kernels, and the loss, by torch.compile."""
        for layer in (*self.trunk, *self.heads):
            layer.compile()
        self.loss = torch.compile(self.loss)  # type: ignore[method-assign]

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Loss of tokens `[B, S]` with labels `[n, B, S]`."""
        cos, sin = self._rotation(tokens)
        z = self.embedding(tokens)
        for layer in self.trunk:
            z = layer(z, cos, sin)
        losses = []
        for layer, target in zip(self.heads, labels, strict=True):
            losses.append(self.loss(layer(z, cos, sin), target))
        return torch.stack(losses).sum()

    def loss(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Mean loss of one head, whose layer gave `[B, S, H]`, with labels `[B, S]`."""
        logits = self.unembedding(self.norm(hidden))
        return F.cross_entropy(logits.flatten(0, 1).float(), target.flatten())

    def _rotation(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        positions = torch.arange(tokens.shape[1], device=tokens.device).float()
        exponents = torch.arange(0, 64, 2, device=tokens.device).float() / 64
        angles = torch.outer(positions, 10_000.0**-exponents).repeat(1, 2)
        dtype = self.embedding.weight.dtype
        return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)  # autocast leaves them in fp32, and x with them
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
