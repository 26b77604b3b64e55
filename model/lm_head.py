"""From a head's output to logits: the final norm, and one unembedding for all heads or one each.

Legend: H hidden, V vocabulary, V' this rank's share of it.
"""

from typing import Any, NamedTuple

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from model.operations.rms_norm import rms_norm


class LMHeadWeights(NamedTuple):
    """The two parameters of the LM head, which all heads share.

    Attributes:
        norm: `[H]`, final RMSNorm.
        unembedding: `[V', H]`; of head 1 alone when the LM head is replicated, and then without a
            row where head 1 is not.
    """

    norm: Tensor
    unembedding: Tensor


class LMHead(ColumnParallelLinear):
    """Final norm and unembedding, shared by all heads (Hugging Face calls the latter `lm_head`).

    Both are parameters of this one module, and calling it hands them out, so that under ZeRO-3
    they are gathered once for all heads and their gradients leave once.
    """

    def __init__(self, config: TransformerConfig, vocab_size: int) -> None:
        super().__init__(**_rows_over_ranks(config, vocab_size))
        self.norm_weight = nn.Parameter(torch.empty(config.hidden_size, dtype=config.params_dtype))
        self.eps = config.layernorm_epsilon

    def forward(self) -> LMHeadWeights:
        """The shared weights as graph tensors, usable after ZeRO-3 has released the parameters."""
        return LMHeadWeights(
            self.norm_weight.view_as(self.norm_weight), self.weight.view_as(self.weight)
        )

    def normalize(self, hidden: Tensor, norm: Tensor) -> Tensor:
        """RMSNorm of `[..., H]` with the shared weight."""
        return rms_norm(hidden, norm, self.eps)


class LMHeadCopy(nn.Module):
    """The LM head of a stage whose heads use one that is trained in another stage.

    Holds values, not parameters: whoever trains the LM head sends them
    (`pipeline.engine.pipeline_stage`).

    Args:
        config: megatron's configuration.
        vocab_size: V; 0 when the heads here have unembeddings of their own.
    """

    weight: Tensor
    norm_weight: Tensor

    def __init__(self, config: TransformerConfig, vocab_size: int) -> None:
        super().__init__()
        rows = vocab_size // config.tensor_model_parallel_size
        for name, shape in (
            ("weight", (rows, config.hidden_size)),
            ("norm_weight", (config.hidden_size,)),
        ):
            empty = torch.empty(shape, dtype=config.params_dtype)
            self.register_buffer(name, empty, persistent=False)
        self.eps = config.layernorm_epsilon

    def forward(self) -> LMHeadWeights:
        """The values, as `LMHead` gives its parameters."""
        return LMHeadWeights(self.norm_weight, self.weight)

    def normalize(self, hidden: Tensor, norm: Tensor) -> Tensor:
        """RMSNorm of `[..., H]` with the shared weight."""
        return rms_norm(hidden, norm, self.eps)


class Unembedding(nn.Module):
    """The unembedding of one head when the LM head is replicated.

    Args:
        config: megatron's configuration.
        vocab_size: V.
    """

    def __init__(self, config: TransformerConfig, vocab_size: int) -> None:
        super().__init__()
        self.unembedding = _UnembeddingWeight(**_rows_over_ranks(config, vocab_size))

    def forward(self) -> Tensor:
        """`[V', H]` as a graph tensor, as `LMHead` gives its own."""
        weight: Tensor = self.unembedding()
        return weight


class _UnembeddingWeight(ColumnParallelLinear):
    """Hands its weight out, so that ZeRO-3 gathers it by the hooks of a call."""

    def forward(self) -> Tensor:
        return self.weight.view_as(self.weight)


def _rows_over_ranks(config: TransformerConfig, vocab_size: int) -> dict[str, Any]:
    """Arguments of a product whose `[V, H]` matrix is split by rows over tensor-parallel ranks."""
    return {
        "input_size": config.hidden_size,
        "output_size": vocab_size,
        "config": config,
        "init_method": lambda tensor: tensor,
        "bias": False,
        "gather_output": False,
    }
