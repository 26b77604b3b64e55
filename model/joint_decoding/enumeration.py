"""Exact joint decoding: all blocks of a few tokens are held against one another.

What `model.joint_decoding.decoder` comes near to, at a cost that grows with the vocabulary to the
power of the block: a reference for small models and blocks.

Legend: B rows, g tokens of a block, w beams, V vocabulary.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from model.decoding.chain import ChainDecoder, RowOptions, Step
from model.decoding.choosing import Drafts
from model.decoding.sampling import GREEDY, Sampling, draw
from model.inference.cache import wide_enough
from model.inference.network import Network
from model.inference.prefill import prefill
from model.joint_decoding.beams import Beams, ending_tokens
from model.joint_decoding.forest import move_path

MOST_BEGINNINGS = 1024  # of blocks, all their tokens but one


class ExactJointDecoder(ChainDecoder):
    """A batch that gets blocks of g tokens, the likeliest (MJGD) or drawn ones (MTJD).

    Class: at a temperature distribution-exact, as the joint distribution of g tokens is that of
    sampling them one by one. At temperature 0 exact for a law of its own: each block is the
    likeliest continuation by g tokens. With g = 1 it is plain decoding, and greedy-exact. A block
    ends early where its text does.

    Args:
        network: the model; its head 1 alone is used.
        block: g; V to the power of g - 1 is at most `MOST_BEGINNINGS`.
        eos_id: token, or tokens, that end a text.
        sampling: how blocks are chosen.
        seeds: one for each row; 0, 1, .. unless given.
        logprobs: whether to compute them.
    """

    def __init__(
        self,
        network: Network,
        *,
        block: int,
        eos_id: int | Collection[int] | None = None,
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
        logprobs: bool = False,
    ) -> None:
        super().__init__(network, heads=1, sampling=sampling, seeds=seeds, logprobs=logprobs)
        vocab_size = network.config.vocab_size
        assert block >= 1, block
        assert vocab_size ** (block - 1) <= MOST_BEGINNINGS, (vocab_size, block)
        self.block = block
        self.most_pending = sum(vocab_size**depth for depth in range(block))
        self._ends = ending_tokens(eos_id, network.device)

    def _read(self, prompts: Sequence[Sequence[int]], rows: Sequence[RowOptions]) -> Step:
        """Read the prompts into an empty cache; the first block of each row."""
        device, longest = self.network.device, max(map(len, prompts))
        padded = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
        tokens = torch.tensor(padded, device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self._rows, self._used = list(rows), [len(prompt) - 1 for prompt in prompts]
        self._chooser = self._new_chooser(rows)
        self._chooser.see(tokens, torch.arange(longest, device=device) < lengths.unsqueeze(1))
        prefill(self.network, self.cache, tokens, lengths, 1)
        # The last token is read once more, as the root of all blocks.
        self.cache.lengths = lengths - 1
        self._following = tokens.gather(1, self.cache.lengths.unsqueeze(1)).squeeze(1)
        self._drafts = Drafts(tokens[:, :0], None)
        return self.step()

    @torch.inference_mode()
    def step(self) -> Step:
        """The next block of each row, in g forwards."""
        kind = torch.promote_types(self.network.dtype, torch.float32)
        beams, layers = Beams.of_roots(self._following, kind), list[Tensor]()
        for depth in range(self.block):
            layers.append(self._continuations(beams))
            cells = beams.cells(beams.log_distributions(layers[-1], self._chooser))
            if depth < self.block - 1:
                every = torch.arange(cells.shape[1], device=cells.device).expand_as(cells)
                beams = beams.grown(every, cells, layers[-1].shape[-1], self._ends)
        tokens, new, path = self._block_of(beams, self._chosen(cells))
        last = (new - 1).unsqueeze(1)
        self._following = tokens.gather(1, last).squeeze(1)
        self._chooser.see(tokens, self.network.numbers(self.block) <= last)
        move_path(self.cache, path)
        # Layers that hold all continuations have them in the order of the forest's nodes.
        logits = torch.cat(layers, dim=1)[self.network.numbers(len(path)).unsqueeze(1), path]
        step = self._step(tokens, new, logits)
        self.cache.lengths = self.cache.lengths + new
        self._used = [u + len(n) for u, n in zip(self._used, step.tokens, strict=True)]
        return step

    def _continuations(self, beams: Beams) -> Tensor:
        """Logits `[B, w, V]` of head 1 after each beam."""
        network, cache = self.network, self.cache
        width = wide_enough(max(self._used) + self.most_pending, cache.capacity)
        block = beams.forest.block(network, cache, beams.nodes, width)
        tokens = beams.forest.tokens.gather(1, beams.nodes)
        trunk_output = network.fill_heads(network.trunk(tokens, cache, block), 1, cache, block)
        hidden = network.heads(trunk_output, 1, 1, cache, block)
        return network.logits(hidden[0]).unflatten(0, tokens.shape)

    def _chosen(self, cells: Tensor) -> Tensor:
        """The cell of each row's block, `[B]`, from the scores `[B, w * V]` of all blocks."""
        chooser, best = self._chooser, cells.argmax(1)
        law = torch.softmax(cells, dim=1)
        chooser.sound = law.sum(1).isfinite()
        if chooser.sampling.greedy:
            return best
        greedy = [sampling.greedy for sampling in chooser.sampling.samplings]
        drawn = draw(law, chooser.uniforms.next(1)[:, 0])
        return torch.where(torch.tensor(greedy, device=cells.device), best, drawn)

    def _block_of(self, beams: Beams, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A block from beams of all its tokens but one, and a cell `[B]` of their continuations.

        Returns:
            `[B, g]` its tokens; `[B]` how many of these, from the first, are the block; `[B, g]`
            the nodes by depth, from the root on, of which the cache needs the keys and values.
        """
        vocab_size, rows = self.network.config.vocab_size, self.network.numbers(len(cell))
        forest, beam = beams.forest, cell // vocab_size
        node = beams.nodes[rows, beam]
        depth = forest.depths[rows, node]
        path = forest.path_to(node, self.block - 1).clamp(max=forest.size - 1)
        tokens = forest.tokens.gather(1, path).roll(-1, dims=1)
        tokens = tokens.scatter(1, depth.unsqueeze(1), (cell % vocab_size).unsqueeze(1))
        return tokens, depth + (~beams.finished[rows, beam]).long(), path
