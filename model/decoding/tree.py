"""The tree: each head proposes its likeliest tokens, one forward verifies all their combinations.

    pending   x          depth 0, committed
              a1 a2      depth 1, the likeliest two tokens of head 2
              b1 b2 b1   depth 2, of head 3: b1 and b2 after a1, b1 after a2

A node sees the text and its ancestors. The one path that head 1 would have taken is kept: its
keys and values move to where a chain's would be (Cai et al. 2024, for heads of another kind).
The likeliest tokens x, a1, b1 are the first nodes, so that where these are kept nothing moves.
At a temperature the tokens of a depth are drawn from the head, none twice, and head 1 keeps one of
a node's children, or none, by speculative sampling.

Legend: B rows, k heads in use, N nodes, m candidates of a depth, W keys looked at, V vocabulary.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from model.decoding.acceptance import accept_tree
from model.decoding.chain import ChainDecoder, Step
from model.decoding.choosing import Drafts
from model.decoding.sampling import GREEDY, Sampling
from model.inference.cache import Block, wide_enough
from model.inference.network import Network


class Tree:
    """The shape of a tree: all combinations of ranks whose sum is at most `spread`.

    A head's likeliest token has rank 0. Example: 3 heads and spread 1 give, below the root, the
    paths 0, 1, 00, 01 and 10.

    Args:
        heads: k; the deepest nodes are at depth k - 1.
        spread: 0 is a chain.
        device: where its tensors are.

    Attributes:
        size: N.
        depths: `[N]`.
        candidates: `[N - 1]` which of a step's (k - 1) * (spread + 1) candidates each node but the
            root is, those of one depth beside each other by rank.
        parents: `[N]` numbers of nodes, the root's is itself.
        ancestors: `[N, N]` bool, true where the column is the row's node or an ancestor of it.
        paths: `[N, k]` the node's ancestors by depth, then itself, then d at depth d.
        children: `[N, spread + 1]` the node's children by rank; -1 = there is none.
        straight: of each node whether its path is the first nodes.
    """

    def __init__(self, heads: int, spread: int, device: torch.device) -> None:
        nodes = [
            ranks
            for depth in range(heads)
            for ranks in itertools.product(range(spread + 1), repeat=depth)
            if sum(ranks) <= spread
        ]
        nodes.sort(key=any)  # the likeliest tokens first; else as they are
        number = {ranks: index for index, ranks in enumerate(nodes)}
        lines = [[number[ranks[:d]] for d in range(len(ranks) + 1)] for ranks in nodes]
        self.size = len(nodes)
        self.depths = torch.tensor([len(ranks) for ranks in nodes], device=device)
        places = [(len(ranks) - 1) * (spread + 1) + ranks[-1] for ranks in nodes[1:]]
        self.candidates = torch.tensor(places, dtype=torch.long, device=device)
        self.parents = torch.tensor([line[-2:][0] for line in lines], device=device)
        self.ancestors = torch.zeros(self.size, self.size, dtype=torch.bool, device=device)
        for index, line in enumerate(lines):
            self.ancestors[index, line] = True
        padded = [[*line, *range(len(line), heads)] for line in lines]
        self.paths = torch.tensor(padded, device=device)
        below = [[number.get((*ranks, rank), -1) for rank in range(spread + 1)] for ranks in nodes]
        self.children = torch.tensor(below, device=device)
        self.straight = [line == [*range(len(line))] for line in lines]


class TreeDecoder(ChainDecoder):
    """A batch that is decoded by trees of drafts.

    Class: greedy-exact at temperature 0, else distribution-exact. At temperature 0 it keeps at
    least as many drafts as the chain; it always computes more.

    Args:
        network: the model.
        heads: k, how many of its heads to use.
        spread: how far from the likeliest tokens, or from the first drawn, it looks, see `Tree`.
        sampling: how head 1 chooses, in rows that `prefill` begins.
        seeds: of these, one for each row; 0, 1, .. unless given.
        logprobs: whether to compute them for these.
    """

    def __init__(
        self,
        network: Network,
        *,
        heads: int,
        spread: int,
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
        logprobs: bool = False,
    ) -> None:
        super().__init__(network, heads=heads, sampling=sampling, seeds=seeds, logprobs=logprobs)
        spread = min(spread, network.config.vocab_size - 1)
        self.tree = Tree(heads, spread, network.device)
        self.spread = spread
        self.most_pending = self.tree.size
        self._bias: Tensor  # [N or N * R, 2 * capacity] of keys, the first node's in the middle

    def open(self, rows: int, capacity: int) -> None:
        """Make room for `rows` rows at once of `capacity` tokens each; none is there yet."""
        super().open(rows, capacity)
        network, room = self.network, self.cache.capacity
        bias = torch.full((self.tree.size, 2 * room), -torch.inf, device=network.device)
        bias[:, :room] = 0
        bias[:, room : room + self.tree.size].masked_fill_(self.tree.ancestors, 0)
        repeats = network.config.attention_heads // network.config.kv_heads
        if self.tree.size > 1 and repeats > 1:
            bias = bias.repeat_interleave(repeats, dim=0)
        self._bias = bias.to(network.dtype)

    @torch.inference_mode()
    def step(self) -> Step:
        """One forward: verify the tree, commit the right path, propose again."""
        tree, heads = self.tree, self._heads
        width = wide_enough(max(self._used) + tree.size, self.cache.capacity)
        pending = self._following.unsqueeze(1)
        if heads > 1:
            below = self._drafts.tokens.flatten(1).index_select(1, tree.candidates)
            pending = torch.cat([pending, below], dim=1)
        block = self._block(width)
        trunk_output = self.network.trunk(pending, self.cache, block)
        trunk_output = self.network.fill_heads(trunk_output, heads, self.cache, block)
        hidden = self._run_heads(trunk_output, block)
        logits = self.network.logits(hidden[0]).unflatten(0, pending.shape)
        node, self._following = self._verify(logits, pending)
        kept, path = tree.depths[node], tree.paths[node]
        tokens = pending.gather(1, path.roll(-1, dims=1))
        tokens = tokens.scatter(1, kept.unsqueeze(1), self._following.unsqueeze(1))
        self._chooser.see(tokens, self.network.numbers(heads) <= kept.unsqueeze(1))
        if heads > 1:
            self._draft(self._others_at(node, hidden, trunk_output, block))
        if any(row.likeliest is not None for row in self._rows):
            logits = logits[self.network.numbers(len(node)).unsqueeze(1), path]
        step = self._step(tokens, kept + 1, logits)
        self._move(node.tolist(), path)
        self.cache.lengths = self.cache.lengths + kept + 1
        self._used = [u + len(n) for u, n in zip(self._used, step.tokens, strict=True)]
        return step

    def _move(self, nodes: Sequence[int], path: Tensor) -> None:
        """Keys and values of the kept paths go to where a chain's would be.

        Args:
            nodes: of each row the last one that is kept.
            path: `[B, k]` theirs.
        """
        rows = [row for row, node in enumerate(nodes) if not self.tree.straight[node]]
        if not rows:
            return
        first = self.cache.lengths.unsqueeze(1)
        sources = self.cache.slots(first + path)
        targets = self.cache.slots(first + self.network.numbers(path.shape[1]))
        self.cache.move(sources[rows], targets[rows])

    def _verify(self, logits: Tensor, pending: Tensor) -> tuple[Tensor, Tensor]:
        """The last node that is kept, `[B]`, and the token that follows it, `[B]`.

        Args:
            logits: `[B, N, V]` of head 1.
            pending: `[B, N]` tokens of the nodes.
        """
        tree = self.tree
        logits = self._chooser.penalized_along(logits, pending[:, 1:], tree.ancestors[:, 1:])
        if not self._chooser.sampling.greedy:
            return self._chooser.verify_tree(logits, self._drafts, tree.children)
        best = logits.argmax(-1)
        node = accept_tree(best, pending, tree.parents, tree.ancestors, tree.depths)
        return node, best.gather(1, node.unsqueeze(1)).squeeze(1)

    def _block(self, width: int) -> Block:
        """Nodes lie one after the other in the cache, at the positions that their depths give."""
        lengths = self.cache.lengths.unsqueeze(1)
        places = lengths + self.network.numbers(self.tree.size)
        positions = lengths + self.tree.depths
        block = self.network.block(self.cache, positions, places, None, width)
        columns = self.network.numbers(width) + (self.cache.capacity - lengths)
        bias = self._bias[:, columns].transpose(0, 1).contiguous()
        return block._replace(mask=bias.unsqueeze(1))

    def _draft(self, logits: Tensor) -> None:
        """The candidates of all depths, from logits `[k - 1, B, V]` of heads 2 .. k."""
        if self._heads > 1:
            self._drafts = self._chooser.candidates(logits, self.spread + 1)
        else:
            self._drafts = Drafts(self._following.new_empty(logits.shape[1], 0), None)
