"""Reads prompts into a cache, in pieces, so that no piece needs memory by the square of its length.

Legend: B rows, S longest prompt, W keys looked at, M heads, H hidden, V vocabulary.
"""

import torch
from torch import Tensor

from model.inference.cache import Cache, wide_enough
from model.inference.network import Network

# Positions of a piece, and the most elements of a later piece's mask.
_PIECE = 512
_SMALLEST_PIECE = 16
_MASK_ELEMENTS = 1 << 24


class LastPosition:
    """What heads take at the last position of each prompt, found while pieces go by.

    Args:
        lengths: `[B]` of the prompts.
    """

    def __init__(self, lengths: Tensor) -> None:
        self._last = lengths - 1
        self._rows = torch.arange(len(lengths), device=lengths.device)
        self.output: Tensor | None = None

    def look(self, trunk_output: Tensor, start: int) -> None:
        """Take what belongs to a piece that begins at `start`, `[..., B * S', H]`."""
        pieces = trunk_output.unflatten(-2, (len(self._rows), -1))
        column = (self._last - start).clamp(0, pieces.shape[-2] - 1)
        here = pieces[..., self._rows, column, :]
        if self.output is not None:
            here = torch.where((self._last >= start).unsqueeze(1), here, self.output)
        self.output = here


def prefill(
    network: Network,
    cache: Cache,
    prompts: Tensor,
    lengths: Tensor,
    heads: int,
    piece: int = _PIECE,
) -> Tensor:
    """Read the prompts and set the cache's lengths.

    Args:
        network: the model.
        cache: an empty one.
        prompts: `[B, S]`, padded on the right with any token.
        lengths: `[B]` of each, at least 1.
        heads: how many heads will be used.
        piece: positions of one forward, at most.

    Returns:
        `[M, B, V]` logits of heads 1 .. `heads` at the last position of each prompt.
    """
    rows, total = prompts.shape
    last = LastPosition(lengths)
    start = 0
    while start < total:
        width = wide_enough(min(start + piece, total), cache.capacity)
        size = piece if start == 0 else min(piece, _piece_at(network, width))
        stop = min(start + size, total)
        positions = torch.arange(start, stop, device=network.device)
        unseen = None
        if start:
            keys = torch.arange(width, device=network.device)
            unseen = (keys > positions.unsqueeze(-1)).unsqueeze(0)
        positions = positions.expand(rows, -1)
        block = network.block(cache, positions, positions, unseen, width)
        trunk_output = network.trunk(prompts[:, start:stop], cache, block)
        last.look(network.fill_heads(trunk_output, heads, cache, block), start)
        start = stop
    cache.lengths = lengths - 1
    block = network.following(cache, 1, wide_enough(total, cache.capacity))
    cache.lengths = lengths
    assert last.output is not None, "prompts without a token"
    return network.head_logits(network.heads(last.output, 1, heads, cache, block), 1)


def _piece_at(network: Network, width: int) -> int:
    """Positions of a piece whose queries look at `width` keys."""
    config = network.config
    elements = width * (config.attention_heads // config.kv_heads)
    return max(_MASK_ELEMENTS // elements, _SMALLEST_PIECE)
