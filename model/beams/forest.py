"""Draft beams as nodes of trees, one tree for each beam that is there, and forwards over them.

Legend: R rows, one tree each, S new nodes of a row at most, N nodes of a row, W keys looked at, H
hidden, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from model.beams.reader import BeamReader
from model.inference.cache import Block, wide_enough

_T = TypeVar("_T")


class Place(NamedTuple):
    """Where a node is.

    Attributes:
        row: of its tree.
        node: its number in the tree; 0 is the root.
    """

    row: int
    node: int


class Tree:
    """The draft beams that begin with one beam, whose last token is the root.

    Args:
        token: the root's.

    Attributes:
        tokens: of each node, parents before their children.
        lines: of each node its ancestors from the root on, and itself.
    """

    def __init__(self, token: int) -> None:
        self.tokens = [token]
        self.lines: list[tuple[int, ...]] = [(0,)]

    def add(self, parent: int, token: int) -> int:
        """A new node's number."""
        self.tokens.append(token)
        self.lines.append((*self.lines[parent], len(self.lines)))
        return len(self.lines) - 1


class NodesRead(NamedTuple):
    """What a forward gave.

    Attributes:
        logits: `[R, S, V]` of head 1, those past a row's nodes of no use.
        states: `[..., R * S, H]` what heads take.
        starts: of each row, the first node that was read.
    """

    logits: Tensor
    states: Tensor
    starts: list[int]

    def at(self, places: Sequence[Place]) -> Tensor:
        """`[places, V]` logits at some nodes."""
        rows = [place.row for place in places]
        return self.logits[rows, [place.node - self.starts[place.row] for place in places]]

    def states_at(self, places: Sequence[Place]) -> Tensor:
        """`[..., places, H]` states at some nodes."""
        size = self.logits.shape[1]
        numbers = [row * size + node - self.starts[row] for row, node in places]
        return self.states[..., numbers, :]


class ForestReader(BeamReader):
    """Reads all nodes of all trees in one forward: a node sees its beam and its ancestors."""

    @torch.inference_mode()
    def read_nodes(self, trees: Sequence[Tree], starts: Sequence[int], heads: int = 1) -> NodesRead:
        """Read the nodes of each row from number `starts[row]` on; those before were read before.

        Args:
            trees: of each row.
            starts: of each row.
            heads: how many heads note keys and values.
        """
        network, cache = self.network, self.cache
        size = max(len(tree.tokens) - start for tree, start in zip(trees, starts, strict=True))
        block = self._block(trees, starts, size)
        rows = zip(trees, starts, strict=True)
        padded = [_padded(tree.tokens[start:], size, 0) for tree, start in rows]
        pending = torch.tensor(padded, device=network.device)
        states = network.trunk(pending, cache, block)
        states = network.fill_heads(states, heads, cache, block)
        self.forwards += 1
        hidden = network.heads(states, 1, 1, cache, block)[0]
        return NodesRead(network.logits(hidden).unflatten(0, pending.shape), states, [*starts])

    def _block(self, trees: Sequence[Tree], starts: Sequence[int], size: int) -> Block:
        """Nodes lie after their row's beam by number, at the positions that their depths give."""
        device, lengths = self.network.device, self.cache.lengths.unsqueeze(1)
        most = max(starts) + size
        depths: list[list[int]] = []
        seen: list[tuple[int, ...]] = []
        for tree, start in zip(trees, starts, strict=True):
            lines = _padded(tree.lines[start:], size, ())
            depths.append([max(len(line) - 1, 0) for line in lines])
            # What stands for no node sees itself alone, besides the beam.
            seen += [line or (start + column,) for column, line in enumerate(lines)]
        visible = torch.zeros(len(seen), most, dtype=torch.bool)
        who = [number for number, line in enumerate(seen) for _ in line]
        visible[who, [node for line in seen for node in line]] = True
        width = wide_enough(self._used + most, self.cache.capacity)
        numbers = self.network.numbers(width)
        unseen = (numbers >= lengths).unsqueeze(1).repeat(1, size, 1)
        nodes = (lengths + numbers[:most]).unsqueeze(1).expand(-1, size, -1)
        unseen.scatter_(2, nodes, ~visible.view(-1, size, most).to(device))
        positions = lengths + torch.tensor(depths, device=device)
        places = lengths + torch.tensor(list(starts), device=device).unsqueeze(1) + numbers[:size]
        return self.network.block(self.cache, positions, places, unseen, width)

    @torch.inference_mode()
    def read_last_two(self, before: Sequence[int], roots: Sequence[int]) -> Tensor:
        """Read the last token of each beam once more, and its tree's root; `[R, V]` after it."""
        network, cache = self.network, self.cache
        pending = torch.tensor([list(before), list(roots)], device=network.device).t()
        lengths = cache.lengths
        cache.lengths = lengths - 1
        block = network.following(cache, 2, wide_enough(self._used + 1, cache.capacity))
        cache.lengths = lengths
        states = network.trunk(pending, cache, block)
        states = network.fill_heads(states, 1, cache, block)
        self.forwards += 1
        at = states.unflatten(-2, (-1, 2))[..., -1, :]
        last = torch.ones_like(lengths)
        return network.logits(network.heads(at, 1, 1, cache, block.at(last))[0])

    @torch.inference_mode()
    def last_heads(self, states: Tensor, heads: int) -> Tensor:
        """Logits `[heads - 1, R, V]` of heads 2 .. `heads` at the last token of each beam.

        Args:
            states: `[..., R, H]` what heads take there.
            heads: number of the last one; all have noted keys and values.
        """
        network, cache = self.network, self.cache
        lengths = cache.lengths
        cache.lengths = lengths - 1
        block = network.following(cache, 1, wide_enough(self._used, cache.capacity))
        cache.lengths = lengths
        return network.head_logits(network.heads(states, 2, heads, cache, block), 2)

    @torch.inference_mode()
    def take_paths(self, trees: Sequence[Tree], places: Sequence[Place]) -> None:
        """Row i becomes the beam of `places[i]`'s tree, with the path to that node after it."""
        before = self.cache.lengths.tolist()
        paths = [trees[row].lines[node] for row, node in places]
        lengths = [before[place.row] + len(path) for place, path in zip(places, paths, strict=True)]
        self._used = max(lengths)
        sources = [
            [
                *range(before[place.row]),
                *(before[place.row] + node for node in path),
                *range(length, self._used),
            ]
            for place, path, length in zip(places, paths, lengths, strict=True)
        ]
        device = self.network.device
        rows = torch.tensor([place.row for place in places], device=device)
        self.cache.gather_places(
            rows, torch.tensor(sources, device=device), torch.tensor(lengths, device=device)
        )


def _padded(values: Sequence[_T], size: int, padding: _T) -> list[_T]:
    return [*values, *[padding] * (size - len(values))]
