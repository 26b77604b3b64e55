"""The trunk: embedding and the first L - n transformer layers, read by every head.

Legend: B batch, S sequence, H hidden, V vocabulary.
"""

from collections.abc import Sequence

from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from model.layers import Checkpointing, Layer, LayerContext


class Trunk(nn.Module):
    """Tokens to the shared representation z (Gloeckle et al. 2024, section 2), or a part of it.

    Args:
        config: megatron's configuration.
        vocab_size: V; the embedding's rows are split over tensor-parallel ranks.
        layers: numbers of the layers to hold, from 0; layer 0 brings the embedding.
        checkpointing: which activations are recomputed in backward.
    """

    def __init__(
        self,
        config: TransformerConfig,
        vocab_size: int,
        layers: Sequence[int],
        *,
        checkpointing: Checkpointing,
    ) -> None:
        super().__init__()
        self.embedding: VocabParallelEmbedding | None = None
        if 0 in layers:
            self.embedding = VocabParallelEmbedding(
                vocab_size,
                config.hidden_size,
                init_method=lambda tensor: tensor,
                reduce_scatter_embeddings=False,
                config=config,
            )
        self.layers = nn.ModuleDict(
            {str(index): Layer(config, index + 1, checkpointing=checkpointing) for index in layers}
        )

    def forward(self, inputs: Tensor, context: LayerContext) -> Tensor:
        """Embed, if the embedding is here, and transform.

        Args:
            inputs: `[B, S]` int64 ids; without the embedding what the layers before gave,
                `[S, B, H]`.
            context: positions and mask of the sequences.

        Returns:
            z `[S, B, H]`, the same on all tensor-parallel ranks.
        """
        hidden = inputs if self.embedding is None else self.embed(inputs)
        return self.transform(hidden, context)

    def embed(self, tokens: Tensor) -> Tensor:
        """Ids `[B, S]` to embeddings `[S, B, H]`, where the embedding is here."""
        assert self.embedding is not None
        embedded: Tensor = self.embedding(tokens)
        return embedded.transpose(0, 1).contiguous()

    def transform(self, hidden: Tensor, context: LayerContext) -> Tensor:
        """The layers over `[S, B, H]`."""
        for layer in self.layers.values():
            hidden = layer(hidden, context)
        return hidden
