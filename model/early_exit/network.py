"""A model with an adapter on its first layers: both ways through it, over one cache.

    tokens ---> layers 0 .. l-1 ---> layers l .. L-1 of the trunk, head 1 ---> LM head
                       |
                       `-----------> adapter --------------------------------> LM head

What the first layers give is computed once: for drafting, and kept for the verification, which
runs the layers above alone. Their keys and values are in the cache for both.

Legend: B rows, S new positions, N = B * S, H hidden.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import embedding

from model.inference.cache import Block, Cache
from model.inference.network import Network
from model.inference.products import Matrix
from model.inference.weights import LayerWeights


class EarlyExitNetwork(Network):
    """Forwards of a model and of the adapter that leaves it early.

    Args:
        network: the model; its weights are shared.
        layer: l, how many layers of its trunk the adapter stands on.
        adapter: the adapter's layers.
    """

    def __init__(
        self, network: Network, layer: int, adapter: Sequence[LayerWeights[Matrix]]
    ) -> None:
        assert 1 <= layer <= network.config.trunk_layers, layer
        super().__init__(network.config, network.weights)
        self.layer = layer
        self._adapter = tuple(adapter)

    def cache_sizes(self, heads: int) -> list[int]:
        """The model's buffers, then the adapter's."""
        return super().cache_sizes(heads) + [self.config.kv_heads] * len(self._adapter)

    def lower(self, tokens: Tensor, cache: Cache, block: Block) -> Tensor:
        """The first layers over new tokens `[B, S]`; `[N, H]`."""
        hidden = embedding(tokens.flatten(), self.weights.embedding)
        return self.run_layers(hidden, self.weights.trunk[: self.layer], 0, cache, block)

    def adapt(self, at_exit: Tensor, cache: Cache, block: Block) -> Tensor:
        """The adapter on what `lower` gave, `[N, H]`, ready for `logits`."""
        first = len(cache.buffers) - len(self._adapter)
        return self.run_layers(at_exit, self._adapter, first, cache, block)

    def upper(self, at_exit: Tensor, cache: Cache, block: Block) -> Tensor:
        """The trunk's other layers on what `lower` gave; z `[N, H]`."""
        layers = self.weights.trunk[self.layer :]
        return self.run_layers(at_exit, layers, self.layer, cache, block)

    def trunk(self, tokens: Tensor, cache: Cache, block: Block) -> Tensor:
        """All of the trunk, as with prompts; the adapter notes its keys and values, too."""
        at_exit = self.lower(tokens, cache, block)
        self.adapt(at_exit, cache, block)
        return self.upper(at_exit, cache, block)
