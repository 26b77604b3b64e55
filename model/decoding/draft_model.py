"""Drafts from a second, smaller model, for a model whose own heads do not help.

Legend: B rows, g drafts, S = g + 1, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

from model.decoding.chain import ChainDecoder, RowOptions, Step
from model.decoding.choosing import Drafts
from model.decoding.sampling import GREEDY, Sampling
from model.inference.cache import Cache, wide_enough
from model.inference.network import Network
from model.inference.prefill import prefill


class BesideSecondModel(ChainDecoder):
    """What decoders share that keep a second model's cache beside their own, row for row.

    Attributes:
        drafter: a model of the same vocabulary, which has read all before the last committed token.
        drafter_cache: its keys and values.
    """

    drafter: Network
    drafter_cache: Cache
    _spare: int  # places of its cache past a row's text
    _read_ahead: int  # of them, those whose tokens may become text as they are
    _before: Tensor  # [B] the token before the last committed one

    def _use(self, drafter: Network, drafts: int) -> None:
        assert drafter.config.vocab_size == self.network.config.vocab_size
        assert drafts >= 1, drafts
        self.drafter = drafter

    def open(self, rows: int, capacity: int) -> None:
        """Make room in both caches."""
        super().open(rows, capacity)
        self.drafter_cache = self.drafter.new_cache(rows, capacity + self._spare, heads=1)
        self.drafter_cache.lengths = self.drafter_cache.lengths[:0]

    @torch.inference_mode()
    def keep(self, order: Sequence[int]) -> None:
        """Rows leave both caches."""
        super().keep(order)
        self.drafter_cache.keep(order, max(self._used, default=0) + self._read_ahead)
        self._before = self._before[list(order)]

    def _beside(self, rows: int) -> Self:
        new = super()._beside(rows)
        new.drafter_cache = self.drafter_cache.beside(rows)
        return new

    def _absorb(self, new: Self) -> None:
        self._before = torch.cat([self._before, new._before]) if self._rows else new._before
        super()._absorb(new)
        self.drafter_cache.absorb(new.drafter_cache)

    def _read(self, prompts: Sequence[Sequence[int]], rows: Sequence[RowOptions]) -> Step:
        """Both models read the prompts."""
        longest = max(map(len, prompts))
        padded = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
        device = self.drafter.device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        prefill(self.drafter, self.drafter_cache, torch.tensor(padded, device=device), lengths, 1)
        self._before = torch.tensor([prompt[-1] for prompt in prompts], device=device)
        return super()._read(prompts, rows)


class DraftModelDecoder(BesideSecondModel):
    """A batch whose drafts a second model writes, token by token (Leviathan et al. 2023).

    Class: greedy-exact at temperature 0, else distribution-exact: what is verified, and how, is
    as with drafts of the heads.

    Args:
        network: the model; its head 1 alone is used.
        drafter: a model of the same vocabulary.
        drafts: g.
        sampling: how head 1 chooses; the drafter does likewise.
        seeds: one for each row; 0, 1, .. unless given.
        logprobs: whether to compute them.
    """

    def __init__(
        self,
        network: Network,
        *,
        drafter: Network,
        drafts: int,
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
        logprobs: bool = False,
    ) -> None:
        super().__init__(network, heads=1, sampling=sampling, seeds=seeds, logprobs=logprobs)
        self._use(drafter, drafts)
        self.num_drafts = drafts
        self.most_pending = drafts + 1
        self._spare = 2 * self.most_pending + 1
        # Its drafts are read already, and will count where they are kept.
        self._read_ahead = self.most_pending

    def _draft(self, logits: Tensor) -> None:
        """The first drafts, after the prompts; the logits of other heads are of no use."""
        self._propose()

    def _draft_after(self, kept: Tensor, pending: Tensor, others: Callable[[], Tensor]) -> None:
        self._before = pending[self.network.numbers(len(kept)), kept]
        self._propose()

    def _propose(self) -> None:
        """Write g drafts after the last committed token.

        The drafter has read all before that token, but not the last draft if all were kept. So it
        reads the token before once more, whatever was kept: the same keys and values again.
        """
        cache, network = self.drafter_cache, self.drafter
        cache.lengths = self.cache.lengths - 1
        width = wide_enough(max(self._used) + self._spare, cache.capacity)
        tokens = torch.stack([self._before, self._following], dim=1)
        drafts = []
        for _ in range(self.num_drafts):
            size = tokens.shape[1]
            block = network.following(cache, size, width)
            trunk_output = network.trunk(tokens, cache, block)
            trunk_output = network.fill_heads(trunk_output, 1, cache, block)
            cache.lengths = cache.lengths + size
            last = torch.full_like(self._following, size - 1)
            at = trunk_output.unflatten(-2, (-1, size))[..., -1, :]
            logits = network.logits(network.heads(at, 1, 1, cache, block.at(last)))
            drafts.append(self._chooser.draft(logits))
            tokens = drafts[-1].tokens
        distributions = [d.distributions for d in drafts if d.distributions is not None]
        self._drafts = Drafts(
            torch.cat([d.tokens for d in drafts], dim=1),
            torch.cat(distributions, dim=1) if distributions else None,
        )
