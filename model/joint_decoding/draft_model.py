"""Joint decoding from the drafts of a second, smaller model, whose beam has a cache of its own.

Legend: B rows, g drafts, w beams, N nodes, V vocabulary.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from model.decoding.chain import RowOptions, Step
from model.decoding.draft_model import BesideSecondModel
from model.decoding.sampling import GREEDY, Sampling
from model.inference.cache import Block, wide_enough
from model.inference.network import Network
from model.joint_decoding.beams import Beams
from model.joint_decoding.decoder import JointDecoder
from model.joint_decoding.forest import move_path
from model.joint_decoding.rule import PUBLISHED, JointRule


class JointModelDecoder(BesideSecondModel, JointDecoder):
    """The same with drafts of another model, which are likelier together than those of heads.

    Class: lossy, as there.

    Args:
        network: the model; its head 1 alone is used.
        drafter: a model of the same vocabulary.
        drafts: g.
        rule: how is drafted, and what is kept.
        eos_id: token, or tokens, that end a text.
        sampling: how head 1 chooses, and what P and Q are taken from.
        seeds: one for each row; 0, 1, .. unless given.
        logprobs: whether to compute them.
    """

    def __init__(
        self,
        network: Network,
        *,
        drafter: Network,
        drafts: int,
        rule: JointRule = PUBLISHED,
        eos_id: int | Collection[int] | None = None,
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
        logprobs: bool = False,
    ) -> None:
        super().__init__(
            network,
            heads=1,
            rule=rule,
            eos_id=eos_id,
            sampling=sampling,
            seeds=seeds,
            logprobs=logprobs,
        )
        self._use(drafter, drafts)
        self._expect(drafts)
        self._spare = 1 + rule.width * drafts  # nodes
        self._read_ahead = 0

    @torch.inference_mode()
    def join(self, prompts: Sequence[Sequence[int]], rows: Sequence[RowOptions]) -> Step:
        """Let rows join; both models read their prompts."""
        self.draft_forwards += 1
        return super().join(prompts, rows)

    def _continuations(self, beams: Beams, layer: int) -> Tensor:
        """Logits `[B, w, V]` of the drafter after each beam of a layer: one of its forwards.

        It has read all before the last token but one, and perhaps that as well: not if it was the
        last of its drafts. So the first layer's forward reads it once more, whatever was kept.
        """
        cache, network, forest = self.drafter_cache, self.drafter, beams.forest
        width = wide_enough(max(self._used) + self._spare, cache.capacity)
        self.draft_forwards += 1
        if layer:
            tokens = forest.tokens.gather(1, beams.nodes)
            return self._forward(tokens, forest.block(network, cache, beams.nodes, width))
        cache.lengths = self.cache.lengths - 1
        tokens = torch.stack([self._before, self._following], dim=1)
        logits = self._forward(tokens, network.following(cache, 2, width))
        cache.lengths = self.cache.lengths
        return logits[:, 1:]

    def _forward(self, tokens: Tensor, block: Block) -> Tensor:
        """Logits `[B, m, V]` of the drafter after tokens `[B, m]`."""
        cache, network = self.drafter_cache, self.drafter
        trunk_output = network.trunk(tokens, cache, block)
        trunk_output = network.fill_heads(trunk_output, 1, cache, block)
        hidden = network.heads(trunk_output, 1, 1, cache, block)
        return network.logits(hidden[0]).unflatten(0, tokens.shape)

    def _settle(self, path: Tensor, last: Tensor) -> None:
        move_path(self.drafter_cache, path)
        self._before = last
