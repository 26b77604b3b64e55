"""Head 1 of a network over rows that are beams: they are copied, and leave, with their caches.

Legend: B prompts, R rows, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.inference.cache import wide_enough
from model.inference.network import Network
from model.inference.prefill import prefill


class BeamReader:
    """Reads beams by a network of any kind: the model's trunk and head 1, or a second model.

    Args:
        network: the model.
        rows: how many beams of all texts there may be at once.
        capacity: tokens that a row may have, its prompt's among them.
        heads: how many of the network's note keys and values.

    Attributes:
        network: as given.
        cache: of the rows.
        forwards: that were made.
    """

    def __init__(self, network: Network, rows: int, capacity: int, heads: int = 1) -> None:
        self.network = network
        self.cache = network.new_cache(rows, capacity, heads)
        self.forwards = 0
        self._used = 0

    @torch.inference_mode()
    def read(self, prompts: Sequence[Sequence[int]], heads: int = 1) -> Tensor:
        """Begin a row for each prompt; `[heads, B, V]` logits after each."""
        device = self.network.device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self._used = max(map(len, prompts))
        padded = [[*prompt, *[0] * (self._used - len(prompt))] for prompt in prompts]
        self.cache.lengths = torch.zeros_like(lengths)
        self.forwards += 1
        tokens = torch.tensor(padded, device=device)
        return prefill(self.network, self.cache, tokens, lengths, heads)

    @torch.inference_mode()
    def take(self, rows: Sequence[int]) -> None:
        """Row i becomes what row `rows[i]` is; a row may be taken more than once, or not at all."""
        if list(rows) != [*range(self.cache.rows)]:
            self.cache.gather(rows, self._used)

    @torch.inference_mode()
    def next(self, tokens: Sequence[int]) -> Tensor:
        """Read one token more of each row; `[R, V]` logits after it."""
        network, cache = self.network, self.cache
        pending = torch.tensor(list(tokens), device=network.device).unsqueeze(1)
        self._used += 1
        block = network.following(cache, 1, wide_enough(self._used, cache.capacity))
        trunk_output = network.trunk(pending, cache, block)
        trunk_output = network.fill_heads(trunk_output, 1, cache, block)
        cache.lengths = cache.lengths + 1
        self.forwards += 1
        return network.logits(network.heads(trunk_output, 1, 1, cache, block)[0])
