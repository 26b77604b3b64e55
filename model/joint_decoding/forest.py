"""What a beam has drafted: nodes below the last committed token, each with its own past.

Unlike the tree of `model.decoding.tree` its shape is a row's own and grows layer by layer. Nodes
lie one after the other in the cache, at positions that their depths give, so no beam's keys and
values are ever copied while it grows; each node sees the text and its ancestors.

Legend: B rows, N nodes, m of them, W keys looked at, D greatest depth.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from model.inference.cache import Block, Cache
from model.inference.network import Network


class Forest(NamedTuple):
    """A tree for each row.

    Attributes:
        tokens: `[B, N]`; the root, node 0, is committed already.
        parents: `[B, N]` numbers of nodes, the root's is itself.
        depths: `[B, N]`, the root's is 0.
        ancestors: `[B, N, N]` bool, true where the column is the row's node or an ancestor of it.
        scores: `[B, N]` logarithmic probability of the path from the root under what drafted it;
            -inf where there is no node.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    ancestors: Tensor
    scores: Tensor

    @classmethod
    def of_roots(cls, tokens: Tensor, dtype: torch.dtype) -> "Forest":
        """Roots alone, `[B]` tokens; scores will be of the type `dtype`."""
        root = tokens.unsqueeze(1)
        nothing = torch.zeros_like(root)
        itself = torch.ones_like(root, dtype=torch.bool).unsqueeze(1)
        return cls(root, nothing, nothing, itself, torch.zeros_like(root, dtype=dtype))

    @property
    def size(self) -> int:
        """N."""
        return self.tokens.shape[1]

    def grown(self, parents: Tensor, tokens: Tensor, scores: Tensor) -> "Forest":
        """The forest with m more nodes in each row, `[B, m]` each; no parent is among them."""
        rows, count = parents.shape
        above = self.ancestors.gather(1, parents.unsqueeze(-1).expand(-1, -1, self.size))
        itself = torch.eye(count, dtype=torch.bool, device=parents.device).expand(rows, -1, -1)
        unseen = torch.zeros(rows, self.size, count, dtype=torch.bool, device=parents.device)
        before = torch.cat([self.ancestors, unseen], dim=2)
        return Forest(
            torch.cat([self.tokens, tokens], dim=1),
            torch.cat([self.parents, parents], dim=1),
            torch.cat([self.depths, self.depths.gather(1, parents) + 1], dim=1),
            torch.cat([before, torch.cat([above, itself], dim=2)], dim=1),
            torch.cat([self.scores, scores], dim=1),
        )

    def cut_to(self, leaves: Tensor) -> tuple["Forest", Tensor]:
        """What leads to some nodes, in the order in which it was.

        Args:
            leaves: `[B, m]` numbers of nodes; of such as are none nothing is kept.

        Returns:
            The smaller forest, with as many nodes as its largest row needs, and `[B, N']` the
            number that each of its nodes had before.
        """
        there = (self.scores > -torch.inf).gather(1, leaves)
        lines = self.ancestors.gather(1, leaves.unsqueeze(-1).expand(-1, -1, self.size))
        needed = (lines & there.unsqueeze(-1)).any(1)
        needed[:, 0] = True
        size = int(needed.sum(1).max())
        origins = (~needed).to(torch.uint8).argsort(dim=1, stable=True)[:, :size]
        numbers = (needed.cumsum(1) - 1).clamp(min=0)
        lines = self.ancestors.gather(1, origins.unsqueeze(-1).expand(-1, -1, self.size))
        smaller = Forest(
            self.tokens.gather(1, origins),
            numbers.gather(1, self.parents.gather(1, origins)),
            self.depths.gather(1, origins),
            lines.gather(2, origins.unsqueeze(1).expand(-1, size, -1)),
            self.scores.masked_fill(~needed, -torch.inf).gather(1, origins),
        )
        return smaller, origins

    def path_to(self, nodes: Tensor, greatest_depth: int) -> Tensor:
        """`[B, D + 1]` the ancestors of nodes `[B]` and these, by depth; then d at depth d."""
        rows, device = len(nodes), nodes.device
        line = self.ancestors[torch.arange(rows, device=device), nodes]
        # What is no ancestor goes into one more column, which is dropped.
        columns = torch.where(line, self.depths, greatest_depth + 1)
        path = torch.arange(greatest_depth + 2, device=device).repeat(rows, 1)
        numbers = torch.arange(self.size, device=device).expand(rows, -1)
        return path.scatter(1, columns, numbers)[:, :-1]

    def along(self, values: Tensor) -> Tensor:
        """`[B, N]` sums of values `[B, N]` of all nodes from below the root to each."""
        lines = self.ancestors.clone()
        lines[..., 0] = False
        return torch.where(lines, values.unsqueeze(1), 0).sum(-1)

    def block(self, network: Network, cache: Cache, nodes: Tensor, width: int) -> Block:
        """Where nodes `[B, m]` stand, after the text that is in the cache; W is `width`."""
        lengths = cache.lengths.unsqueeze(1)
        after = network.numbers(width) - lengths
        sees = self.ancestors.gather(1, nodes.unsqueeze(-1).expand(-1, -1, self.size))
        columns = after.clamp(0, self.size - 1).unsqueeze(1).expand(-1, nodes.shape[1], -1)
        hidden = ~sees.gather(2, columns) | (after >= self.size).unsqueeze(1)
        unseen = hidden & (after >= 0).unsqueeze(1)
        positions = lengths + self.depths.gather(1, nodes)
        return network.block(cache, positions, lengths + nodes, unseen, width)


def move_path(cache: Cache, path: Tensor) -> None:
    """Keys and values of `[B, D + 1]` nodes by depth go to where a chain's would be."""
    first = cache.lengths.unsqueeze(1)
    straight = torch.arange(path.shape[1], device=path.device)
    cache.move(cache.slots(first + path), cache.slots(first + straight))
