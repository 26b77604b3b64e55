"""The heads, some layers or a linear map each, of the kinds of `model.structure.head_kinds`.

Head k at position t predicts token t+k; heads count from 1 (Gloeckle et al. 2024, section 2).

Legend: B batch, S sequence, H hidden, V vocabulary, V' this rank's share of it.
"""

from collections.abc import Collection, Iterator

from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from model.config import ModelConfig
from model.layers import Checkpointing, Layer, LayerContext
from model.lm_head import LMHead, LMHeadCopy, Unembedding


class LinearHead(nn.Module):
    """One linear map H to H, without a residual (Gloeckle et al. 2024, appendix B).

    Args:
        config: megatron's configuration.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self._num_ranks = config.tensor_model_parallel_size
        self.projection = RowParallelLinear(
            config.hidden_size,
            config.hidden_size,
            config=config,
            init_method=lambda tensor: tensor,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
        )

    def forward(self, hidden: Tensor, context: LayerContext) -> Tensor:
        """`[S, B, H]` to `[S, B, H]`; the positions are of no account."""
        del context
        # Megatron's own way of giving each rank its columns works on GPUs alone.
        hidden = copy_to_tensor_model_parallel_region(hidden)
        rank = parallel_state.get_tensor_model_parallel_rank()
        mine = hidden.chunk(self._num_ranks, dim=-1)[rank]
        output: Tensor = self.projection(mine.contiguous())[0]
        return output


class LayeredHead(nn.ModuleList):
    """A head of several transformer layers, one after the other."""

    def forward(self, hidden: Tensor, context: LayerContext) -> Tensor:
        """`[S, B, H]` to `[S, B, H]`."""
        for layer in self:
            hidden = layer(hidden, context)
        return hidden


class Heads(nn.Module):
    """The heads and their LM head, or some of them.

    Args:
        config: sizes.
        layer_config: megatron's configuration.
        numbers: which heads to hold, from 1; the LM head is trained with head 1, the others have
            a copy of it, and without heads there is none.
        checkpointing: which activations are recomputed in backward. Chains of heads do that
            themselves, see `model.backward`, and not a second time.

    Attributes:
        numbers: of the heads held, rising.
        order: the same in the order in which they are computed.
    """

    readout: LMHead | LMHeadCopy

    def __init__(
        self,
        config: ModelConfig,
        layer_config: TransformerConfig,
        numbers: Collection[int],
        *,
        checkpointing: Checkpointing,
    ) -> None:
        super().__init__()
        self.numbers = tuple(sorted(numbers))
        self.order = tuple(head for head in config.head_order if head in numbers)
        self._chain = config.chain
        if config.chain and checkpointing == "full":
            checkpointing = "none"
        self.layers = nn.ModuleDict(
            {
                str(head): _head(config, layer_config, head, checkpointing=checkpointing)
                for head in self.numbers
            }
        )
        replicated = config.lm_head == "replicated"
        if self.numbers:
            # The attribute names the parameters `heads.readout.*`. Checkpoints store these names
            # and initial weights are drawn from them, so the attribute keeps its old name.
            if 1 in numbers:
                self.readout = LMHead(layer_config, config.vocab_size)
            else:
                self.readout = LMHeadCopy(layer_config, 0 if replicated else config.vocab_size)
        self.readouts = nn.ModuleDict(
            {
                str(head): Unembedding(layer_config, config.vocab_size)
                for head in self.numbers
                if replicated and head > 1
            }
        )

    @property
    def lm_head(self) -> LMHead | LMHeadCopy:
        """Final norm and unembedding; a part of the model without heads has none."""
        return self.readout

    def hidden(self, head: int, inputs: Tensor, context: LayerContext) -> Tensor:
        """One head on what it reads, before the norm: `[S, B, H]` to `[S, B, H]`."""
        output: Tensor = self.layers[str(head)](inputs, context)
        return output

    def outputs(self, inputs: Tensor, context: LayerContext) -> Iterator[tuple[int, Tensor]]:
        """Every head held, in the order of computing, with its output before the norm.

        Args:
            inputs: `[S, B, H]` what the first of them reads: the trunk's output or, in a stage
                that goes on with a chain, what the head before it gave.
            context: of the sequences.
        """
        for head in self.order:
            hidden = self.hidden(head, inputs, context)
            yield head, hidden
            if self._chain:
                inputs = hidden

    def own_unembedding(self, head: int) -> Tensor | None:
        """`[V', H]` of a head that does not use the LM head's, as a graph tensor; else None."""
        readout = str(head)
        return self.readouts[readout]() if readout in self.readouts else None


def _head(
    config: ModelConfig, layer_config: TransformerConfig, head: int, *, checkpointing: Checkpointing
) -> nn.Module:
    if config.head_kind == "linear":
        return LinearHead(layer_config)
    each = config.layers_per_head
    # Megatron counts layers from 1, in the order in which they are computed.
    first = config.trunk_layers + each * config.head_order.index(head) + 1
    layers = [
        Layer(layer_config, number, checkpointing=checkpointing)
        for number in range(first, first + each)
    ]
    return layers[0] if each == 1 else LayeredHead(layers)
