"""Drafts of an adapter on the model's first layers, as many as it is sure of (Liu et al. 2024).

A step drafts token by token through the first layers and the adapter, and then verifies all drafts
in one forward of the layers above:

    token        x    d1   d2   d3       first layers and adapter, one position after the other
    confidence   .9   .8   .3            of d1, d2, d3; below the threshold, d3 is the last draft
    verify       y0   y1   y2   y3       layers above and head 1, at all four positions at once

Legend: B rows, g drafts of a step, S = g + 1, H hidden, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.decoding.chain import ChainDecoder, Step
from model.decoding.choosing import Drafts
from model.decoding.sampling import GREEDY, Sampling
from model.early_exit.network import EarlyExitNetwork
from model.inference.cache import Block, wide_enough


class EarlyExitDecoder(ChainDecoder):
    """A batch whose drafts the model's own first layers write, through an adapter.

    Class: greedy-exact at temperature 0, else distribution-exact: what is verified, and how, is
    as with drafts of the heads. Whether a row drafts on depends on nothing but what it has drafted.

    Args:
        network: the model with its adapter; head 1 alone verifies.
        threshold: a row drafts on while the likeliest token of its last draft has more than this
            probability, before temperature and penalty; 0 = always, 1 = one draft only.
        most_drafts: of a step, at most.
        sampling: how head 1 chooses; the adapter does likewise.
        seeds: one for each row; 0, 1, .. unless given.
        logprobs: whether to compute them.

    Attributes:
        tried: how often each draft of a step, the first one first, was verified after all before
            it had been kept.
        kept: how often it was then kept.
    """

    def __init__(
        self,
        network: EarlyExitNetwork,
        *,
        threshold: float,
        most_drafts: int,
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
        logprobs: bool = False,
    ) -> None:
        super().__init__(network, heads=1, sampling=sampling, seeds=seeds, logprobs=logprobs)
        assert 0 <= threshold <= 1, threshold
        assert most_drafts >= 1, most_drafts
        self._exit = network
        self._threshold = threshold
        self._most_drafts = most_drafts
        self.most_pending = most_drafts + 1
        self.tried = [0] * most_drafts
        self.kept = [0] * most_drafts
        self._at_exit: Tensor

    @torch.inference_mode()
    def step(self) -> Step:
        """Draft, verify the drafts in one forward, commit those that are kept."""
        made = self._propose()
        self._skip_uniforms(most := self._drafts.tokens.shape[1])
        step = super().step()
        self._skip_uniforms(most)
        self._count(made, step)
        return step

    def _run_trunk(self, pending: Tensor, block: Block) -> Tensor:
        """The layers above the exit; those below it ran when the tokens were drafted."""
        del pending
        return self._exit.upper(self._at_exit, self.cache, block)

    def _propose(self) -> list[int]:
        """Draft until no row is sure of its last draft; how many drafts each row has.

        A row that stops before others goes on with them. Of greedy rows what comes then counts as
        well, since it costs nothing more; of sampled ones it does not, so that a row gets what it
        would get alone.
        """
        cache, network = self.cache, self._exit
        width = wide_enough(max(self._used) + self.most_pending, cache.capacity)
        committed, tokens = cache.lengths, self._following.unsqueeze(1)
        going = torch.ones_like(self._following, dtype=torch.bool)
        flags, made = [1] * len(going), [0] * len(going)
        outputs: list[Tensor] = []
        drafts: list[Tensor] = []
        distributions: list[Tensor] = []
        while True:
            block = network.following(cache, 1, width)
            outputs.append(network.lower(tokens, cache, block))
            hidden = network.adapt(outputs[-1], cache, block)
            cache.lengths = cache.lengths + 1
            if len(drafts) == self._most_drafts or not any(flags):
                break
            logits = network.logits(hidden)
            draft = self._chooser.draft(logits.unsqueeze(0))
            drafts.append(draft.tokens)
            if draft.distributions is None:
                flags = [1] * len(flags)
            else:  # without a distribution a draft is never kept, and head 1's own decides
                distributions.append(draft.distributions * going[:, None, None])
            made = [count + flag for count, flag in zip(made, flags, strict=True)]
            going = going & (confidence(logits) > self._threshold)
            tokens, flags = draft.tokens, going.tolist()
        cache.lengths = committed
        self._at_exit = torch.stack(outputs, dim=1).flatten(0, 1)
        chances = torch.cat(distributions, dim=1) if distributions else None
        self._drafts = Drafts(torch.cat(drafts, dim=1), chances)
        return made

    def _skip_uniforms(self, drafts: int) -> None:
        """Each step takes as many numbers, so that a row's do not depend on others' drafts."""
        if not self._chooser.sampling.greedy:
            self._chooser.uniforms.next(self._most_drafts - drafts)

    def _count(self, made: Sequence[int], step: Step) -> None:
        for drafts, tokens in zip(made, step.tokens, strict=True):
            for number in range(drafts):
                self.tried[number] += number < len(tokens)
                self.kept[number] += number + 1 < len(tokens)


def confidence(logits: Tensor) -> Tensor:
    """`[B]` probability of the likeliest token, from logits `[B, V]`."""
    kind = torch.promote_types(logits.dtype, torch.float32)
    return torch.softmax(logits, dim=-1, dtype=kind).amax(-1)
