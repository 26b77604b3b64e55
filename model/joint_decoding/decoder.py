"""Joint decoding from drafts: a beam of the heads, and the longest part that is likely as a whole.

One iteration (MTAD of Qin et al. 2024; at temperature 0 their MJSD):

    draft      a beam of width w grows g layers from the last committed token; the c best of its
               beams are candidates, each node with its probability Q from there on
    verify     one forward of head 1 over all candidates, as a tree, gives each node's P
    commit     the deepest node with min(1, P / Q) > tau and all before it, then one more token
               that head 1 chooses as ever

Q is the product of what the drafter says of each token after those before it, in the published
code one of two readings; the other takes the last step's share among all beams.

Legend: B rows, k heads in use, g = k - 1 drafts, w beams, N nodes, V vocabulary.
"""

from collections.abc import Collection, Sequence
from typing import Self

import torch
from torch import Tensor

from model.decoding.chain import ChainDecoder, Step
from model.decoding.choosing import Drafts
from model.decoding.sampling import GREEDY, Sampling, draw
from model.inference.cache import wide_enough
from model.inference.network import Network
from model.joint_decoding.acceptance import accept_joint
from model.joint_decoding.beams import Beams, choose_cells, ending_tokens
from model.joint_decoding.forest import Forest, move_path
from model.joint_decoding.rule import PUBLISHED, JointRule


class JointDecoder(ChainDecoder):
    """A batch of which each row gets several tokens at once, by their joint probability.

    Class: lossy, but for tau = 1, which is plain decoding. Texts are not those of head 1, nor drawn
    from its distribution; how good they are has to be measured.

    Args:
        network: the model.
        heads: k, how many of its heads to use; heads 2 .. k draft, and Q is their product.
        rule: how is drafted, and what is kept.
        eos_id: token, or tokens, that end a text: no draft goes on after them.
        sampling: how head 1 chooses, and what P and Q are taken from; at temperature 0 these are
            the models' own, and beams are the likeliest instead of drawn ones.
        seeds: one for each row; 0, 1, .. unless given.
        logprobs: whether to compute them.

    Attributes:
        draft_forwards: of a second model.
        tried: how often drafts of each depth were verified, in all rows.
    """

    def __init__(
        self,
        network: Network,
        *,
        heads: int,
        rule: JointRule = PUBLISHED,
        eos_id: int | Collection[int] | None = None,
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
        logprobs: bool = False,
    ) -> None:
        assert 1 <= rule.candidates <= rule.width, rule
        super().__init__(network, heads=heads, sampling=sampling, seeds=seeds, logprobs=logprobs)
        self.rule = rule
        self.draft_forwards = 0
        self.tried: list[int] = []
        self._ends = ending_tokens(eos_id, network.device)
        self._offers: Tensor  # [B, g, V] logits of heads 2 .. k after the last but one token
        self._expect(heads - 1)

    def _expect(self, drafts: int) -> None:
        """Make room for so many drafts, g."""
        self.most_pending = 1 + self.rule.candidates * drafts
        self.tried = [0] * drafts

    def _absorb(self, new: Self) -> None:
        self._offers = torch.cat([self._offers, new._offers]) if self._rows else new._offers
        super()._absorb(new)

    @torch.inference_mode()
    def keep(self, order: Sequence[int]) -> None:
        """Let rows leave: row `order[i]` becomes row i, the others are gone."""
        super().keep(order)
        self._offers = self._offers[list(order)]

    @torch.inference_mode()
    def step(self) -> Step:
        """Draft, verify the candidates in one forward, commit what is kept."""
        beams = self._drafted()
        best = beams.scores.topk(min(self.rule.candidates, beams.scores.shape[1])).indices
        forest, origins = beams.forest.cut_to(beams.nodes.gather(1, best))
        self._count(forest)
        width = wide_enough(max(self._used) + self.most_pending, self.cache.capacity)
        nodes = self.network.numbers(forest.size).expand_as(forest.tokens)
        block = forest.block(self.network, self.cache, nodes, width)
        trunk_output = self.network.trunk(forest.tokens, self.cache, block)
        trunk_output = self.network.fill_heads(trunk_output, self._most_heads, self.cache, block)
        hidden = self._run_heads(trunk_output, block)
        logits = self.network.logits(hidden[0]).unflatten(0, forest.tokens.shape)
        node = self._accept(logits, forest)
        self._chooser.sound &= ~beams.scores.isnan().any(1)
        if self._heads > 1:
            self._draft(self._others_at(node, hidden, trunk_output, block))
        else:
            self._offers = self._offers[:, :0]
        return self._commit(forest, origins, node, logits)

    def _commit(self, forest: Forest, origins: Tensor, node: Tensor, logits: Tensor) -> Step:
        """Let the path to a node become text.

        Args:
            forest: what was verified.
            origins: `[B, N]` numbers of its nodes in what was drafted.
            node: `[B]` the last one that is kept.
            logits: `[B, N, V]` of head 1.
        """
        kept = forest.depths.gather(1, node.unsqueeze(1)).squeeze(1)
        path = forest.path_to(node, len(self.tried))
        if self.rule.candidates > 1:  # one alone lies as a chain does
            move_path(self.cache, path)
        path = path.clamp(max=forest.size - 1)
        pending = forest.tokens.gather(1, path)
        tokens = pending.roll(-1, dims=1).scatter(
            1, kept.unsqueeze(1), self._following.unsqueeze(1)
        )
        self._settle(origins.gather(1, path), pending.gather(1, kept.unsqueeze(1)).squeeze(1))
        self._chooser.see(tokens, self.network.numbers(path.shape[1]) <= kept.unsqueeze(1))
        if any(row.likeliest is not None for row in self._rows):
            logits = logits[self.network.numbers(len(node)).unsqueeze(1), path]
        step = self._step(tokens, kept + 1, logits)
        self.cache.lengths = self.cache.lengths + kept + 1
        self._used = [u + len(n) for u, n in zip(self._used, step.tokens, strict=True)]
        return step

    def _drafted(self) -> Beams:
        """The beams after g layers."""
        kind = torch.promote_types(self.network.dtype, torch.float32)
        beams = Beams.of_roots(self._following, kind)
        for layer in range(len(self.tried)):
            logits = self._continuations(beams, layer)
            if logits is None:
                break
            cells = beams.cells(beams.log_distributions(logits, self._chooser))
            chosen, scores = choose_cells(cells, self.rule.width, self._chooser)
            beams = beams.grown(chosen, scores, logits.shape[-1], self._ends)
        return beams

    def _continuations(self, beams: Beams, layer: int) -> Tensor | None:
        """Logits `[B, w, V]` of what drafts, after each beam of a layer; None = nothing does."""
        if layer >= self._offers.shape[1]:
            return None
        return self._offers[:, layer : layer + 1].expand(-1, beams.nodes.shape[1], -1)

    def _settle(self, path: Tensor, last: Tensor) -> None:
        """What drafted takes note of what is kept; heads have nothing to note.

        Args:
            path: `[B, g + 1]` numbers of the kept nodes in what was drafted, by depth.
            last: `[B]` the last kept token.
        """

    def _draft(self, logits: Tensor) -> None:
        """Note logits `[g, B, V]` of heads 2 .. k, from which the next step drafts."""
        self._offers = logits.transpose(0, 1)
        self._drafts = Drafts(self._following.new_empty(logits.shape[1], 0), None)

    def _accept(self, logits: Tensor, forest: Forest) -> Tensor:
        """The last node that is kept, `[B]`; also chooses the token that follows it.

        Args:
            logits: `[B, N, V]` of head 1.
            forest: the nodes.
        """
        chooser, rows = self._chooser, self.network.numbers(len(logits))
        logits = chooser.penalized_along(logits, forest.tokens[:, 1:], forest.ancestors[..., 1:])
        likelihoods = chooser.sampling.log_distributions(logits)
        each = likelihoods[rows.unsqueeze(1), forest.parents, forest.tokens]
        node = accept_joint(forest.along(each), forest.scores, forest.depths, self.rule.threshold)
        there = logits[rows, node]
        chooser.sound = likelihoods[rows, node].exp().sum(-1).isfinite()
        if chooser.sampling.greedy:
            self._following = there.argmax(-1)
        else:
            target = chooser.sampling.chosen_from(there.unsqueeze(1)).squeeze(1)
            self._following = draw(target, chooser.uniforms.next(1)[:, 0])
        return node

    def _count(self, forest: Forest) -> None:
        reached = torch.where(forest.scores > -torch.inf, forest.depths, 0).amax(1).tolist()
        for depth in range(len(self.tried)):
            self.tried[depth] += sum(deepest > depth for deepest in reached)
