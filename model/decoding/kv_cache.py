"""Key-value cache with a length per sequence, so that those of a batch may advance unevenly.

Legend: B batch, S new positions, C capacity, G key-value heads, D head dimension.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class CachedAttention(NamedTuple):
    """Keys and values of all cached positions, and which of them each query may see.

    Attributes:
        key: `[B, G, C', D]`, C' = positions in use by the longest sequence.
        value: `[B, G, C', D]`.
        mask: `[B, 1, S, C']` bool, true where the query sees the key.
    """

    key: Tensor
    value: Tensor
    mask: Tensor


class KVCache:
    """Keys and values of every attention layer of a model, for one batch.

    Rejected drafts are forgotten by `commit`, which only sets the lengths: entries past a
    sequence's length are never visible and are overwritten in place by the next forward.

    Args:
        batch_size: B.
        capacity: positions each sequence can hold.
        device: where the cache lives.
    """

    def __init__(self, batch_size: int, capacity: int, device: torch.device) -> None:
        self.batch_size = batch_size
        self.capacity = capacity
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.positions = torch.empty(batch_size, 0, dtype=torch.long, device=device)
        self._width = 0
        self._mask = torch.empty(0)
        self._batch = torch.arange(batch_size, device=device).unsqueeze(1)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def begin(self, num_positions: int) -> Tensor:
        """Start a forward over the next `num_positions` positions of every sequence.

        Returns:
            `[B, S]` absolute positions of the new tokens.
        """
        device = self.lengths.device
        steps = torch.arange(num_positions, device=device)
        self.positions = self.lengths.unsqueeze(1) + steps
        self._width = int(self.positions.max()) + 1
        assert self._width <= self.capacity, (self._width, self.capacity)
        keys = torch.arange(self._width, device=device)
        self._mask = (keys <= self.positions.unsqueeze(-1)).unsqueeze(1)
        return self.positions

    def update(self, layer: int, key: Tensor, value: Tensor) -> CachedAttention:
        """Write the new keys and values of one layer and return all that are visible.

        Args:
            layer: any number that is the layer's own.
            key: `[S, B, G, D]`, rotary already applied.
            value: `[S, B, G, D]`.
        """
        if layer not in self._layers:
            shape = (self.batch_size, self.capacity, *key.shape[2:])
            self._layers[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        keys, values = self._layers[layer]
        keys[self._batch, self.positions] = key.transpose(0, 1)
        values[self._batch, self.positions] = value.transpose(0, 1)
        return CachedAttention(
            keys[:, : self._width].transpose(1, 2),
            values[:, : self._width].transpose(1, 2),
            self._mask,
        )

    def commit(self, lengths: Tensor) -> None:
        """Keep the first `lengths[b]` positions of each sequence `[B]`; forget the rest."""
        self.lengths = lengths
