"""The heads: one transformer layer each on the trunk's output, and the LM head they share.

Head k at position t predicts token t+k; heads count from 1 (Gloeckle et al. 2024, section 2).

Legend: B batch, S sequence, H hidden, V vocabulary, V' this rank's share of it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from model.layers import Checkpointing, Layer, LayerContext
from model.operations.rms_norm import rms_norm


class LMHeadWeights(NamedTuple):
    """The two parameters of the LM head, which all heads share.

    Attributes:
        norm: `[H]`, final RMSNorm.
        unembedding: `[V', H]`.
    """

    norm: Tensor
    unembedding: Tensor


class LMHead(ColumnParallelLinear):
    """Final norm and unembedding, shared by all heads (Hugging Face calls the latter `lm_head`).

    Both are parameters of this one module, and calling it hands them out, so that under ZeRO-3
    they are gathered once for all heads and their gradients leave once.
    """

    def __init__(self, config: TransformerConfig, vocab_size: int) -> None:
        super().__init__(
            config.hidden_size,
            vocab_size,
            config=config,
            init_method=lambda tensor: tensor,
            bias=False,
            gather_output=False,
        )
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
    (`pipeline.engine.staged_engine`).
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


class Heads(nn.Module):
    """The head layers and their LM head, or some of them.

    Args:
        config: megatron's configuration.
        vocab_size: V.
        numbers: which heads to hold, from 1; the LM head is trained with head 1, the others have
            a copy of it, and without heads there is none.
        first_layer: layer number of head 1 (the trunk's layers come before it).
        checkpointing: which activations are recomputed in backward.
    """

    readout: LMHead | LMHeadCopy

    def __init__(
        self,
        config: TransformerConfig,
        vocab_size: int,
        numbers: Sequence[int],
        *,
        first_layer: int,
        checkpointing: Checkpointing,
    ) -> None:
        super().__init__()
        self.numbers = tuple(numbers)
        self.layers = nn.ModuleDict(
            {
                str(head): Layer(config, first_layer + head - 1, checkpointing=checkpointing)
                for head in numbers
            }
        )
        if self.numbers:
            kind = LMHead if 1 in numbers else LMHeadCopy
            # The attribute names the parameters `heads.readout.*`. Checkpoints store these names
            # and initial weights are drawn from them, so the attribute keeps its old name.
            self.readout = kind(config, vocab_size)

    @property
    def lm_head(self) -> LMHead | LMHeadCopy:
        """Final norm and unembedding; a part of the model without heads has none."""
        return self.readout

    def hidden(self, head: int, trunk_output: Tensor, context: LayerContext) -> Tensor:
        """Head layer `head` on the trunk's output, before the norm: `[S, B, H]` to `[S, B, H]`."""
        output: Tensor = self.layers[str(head)](trunk_output, context)
        return output
