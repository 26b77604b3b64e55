"""The memory's own parameters, and the prompt that is made of earlier memories.

Legend: B batch, H hidden, D width of the retrieval (d_h), N memories that are there.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.memory.sizes import MemorySizes, memory_shapes


class MemoryWeights(NamedTuple):
    """The parameters; without retrieval only the first.

    Attributes:
        initial: `[1, H]`, the memory of a stream that has just begun.
        summary: `[1, H]`, T, the embedding that asks for a summary.
        query: `[D, H]`, W_q.
        key: `[D, H]`, W_k.
    """

    initial: Tensor
    summary: Tensor | None = None
    query: Tensor | None = None
    key: Tensor | None = None


class MemoryParameters(nn.Module):
    """Holds the parameters, and hands them out when it is called.

    So ZeRO-3 gathers them once for all segments of a forward, as it does the LM head.

    Args:
        sizes: of the memory.
        hidden_size: H.
        dtype: of the weights.
    """

    def __init__(self, sizes: MemorySizes, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        shapes = memory_shapes(sizes, hidden_size)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype)))
        self._names = tuple(shapes)

    def forward(self) -> MemoryWeights:
        """The parameters as graph tensors."""
        weights = (self.get_parameter(name) for name in self._names)
        return MemoryWeights(*(weight.view_as(weight) for weight in weights))


def retrieve(
    weights: MemoryWeights, summary: Tensor, memories: Tensor, hidden: Tensor | None = None
) -> Tensor:
    """The prompt: a mean of memories, weighted by how well each answers the summary (eq. 2, 3).

    Args:
        weights: with those of the retrieval.
        summary: `[B, H]`.
        memories: `[N, B, H]`, N at least 1.
        hidden: `[N, B]` bool, true for memories that a row may not see; a row that may see none
            gets the initial memory. None: each row sees all.

    Returns:
        `[B, H]`, in the convex hull of the memories that the row sees.
    """
    share = recall(weights, summary, memories, hidden)
    prompt = torch.einsum("nb,nbh->bh", share.to(memories.dtype), memories)
    if hidden is None:
        return prompt
    return torch.where(hidden.all(0).unsqueeze(1), weights.initial.expand_as(prompt), prompt)


def recall(
    weights: MemoryWeights, summary: Tensor, memories: Tensor, hidden: Tensor | None = None
) -> Tensor:
    """The shares of the memories in the prompt, `[N, B]`, at least float32; see `retrieve`.

    They add up to 1; those of a row that may see none are all alike and mean nothing.
    """
    assert weights.query is not None
    assert weights.key is not None
    query, key = summary @ weights.query.t(), memories @ weights.key.t()
    precise = torch.promote_types(query.dtype, torch.float32)
    scores = torch.einsum("bd,nbd->nb", query.to(precise), key.to(precise))
    scores = scores / math.sqrt(weights.query.shape[0])
    if hidden is not None:
        # Finite, so that a row without memories has finite gradients, too.
        scores = scores.masked_fill(hidden, torch.finfo(precise).min)
    return scores.softmax(dim=0)


class _Touched(torch.autograd.Function):
    """Passes a tensor on, and gives some weights a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(*weights)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        return (*grad_outputs, *(torch.zeros_like(weight) for weight in ctx.saved_tensors))


def with_gradients(output: Tensor, weights: MemoryWeights) -> Tensor:
    """The output, whose backward gives every weight a gradient even where none was used.

    Segments without a predecessor retrieve nothing, and later ones may not need the initial
    memory; ZeRO wants one gradient of every parameter in every backward.
    """
    trained = [weight for weight in weights if weight is not None and weight.requires_grad]
    if not trained:
        return output
    touched: Tensor = _Touched.apply(output, *trained)
    return touched
