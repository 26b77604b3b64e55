"""The chain: each head drafts one token, head 1 verifies them all in the next forward.

One forward does both. It runs over the last committed token and the drafts that follow it; head 1
says which drafts were right and what comes after them, heads 2 .. k draft the next block at the
last position that was right:

    pending    x    d1   d2   d3        positions m-1 .. m+2
    head 1     y0   y1   y2   y3        d1 = y0, d2 = y1, d3 != y2: two drafts are kept,
    commit     d1   d2   y2             y2 follows them, d3 is forgotten
    next       y2   e1   e2   e3        e1 .. e3: heads 2 .. 4 at the position of d2

(Gloeckle et al. 2024, after Stern et al. 2018.)

Legend: B rows, k heads in use, S = k positions of a forward, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.decoding.choosing import Chooser, Drafts
from model.decoding.sampling import GREEDY, Sampling
from model.errors import CheckpointError
from model.inference.cache import Block, wide_enough
from model.inference.network import Network
from model.inference.prefill import prefill

# Up to so many positions, heads 2 .. k run at all of them beside head 1, though one of each row is
# of use: a second pass of few rows costs as much as the operations it consists of.
_TOGETHER = 16


class Step(NamedTuple):
    """What one forward gave each row.

    Attributes:
        tokens: for each row its new tokens.
        logprobs: for each row their logarithmic probabilities by head 1 itself, before
            temperature and penalty; None unless asked for.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]] | None


class ChainDecoder:
    """A batch that is decoded by chains of drafts; with one head plain autoregressive decoding.

    Class: greedy-exact at temperature 0, else distribution-exact. Rows advance unevenly and do not
    influence one another.

    Args:
        network: the model.
        heads: k, how many of its heads to use.
        sampling: how head 1 chooses.
        seeds: one for each row; 0, 1, .. unless given.
        logprobs: whether to compute them.

    Attributes:
        most_pending: tokens of a step's forward in each row.
    """

    def __init__(
        self,
        network: Network,
        *,
        heads: int,
        sampling: Sampling = GREEDY,
        seeds: Sequence[int] | None = None,
        logprobs: bool = False,
    ) -> None:
        assert 1 <= heads <= network.num_heads, heads
        self.network = network
        self.most_pending = heads
        self.sampling = sampling
        self.logprobs = logprobs
        self._heads = heads
        self._seeds = seeds
        self._drafts: Drafts

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Step:
        """Read the prompts, at least one token each.

        Args:
            prompts: of every row.
            max_new_tokens: for how many tokens of each row there must be room.

        Returns:
            The first new token of each row.
        """
        device = self.network.device
        self._used = [len(prompt) for prompt in prompts]
        longest = max(self._used)
        padded = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
        tokens = torch.tensor(padded, device=device)
        lengths = torch.tensor(self._used, device=device)
        seeds = range(len(prompts)) if self._seeds is None else self._seeds
        self._chooser = self._new_chooser(seeds)
        self._chooser.see(tokens, torch.arange(longest, device=device) < lengths.unsqueeze(1))
        capacity = longest + max_new_tokens + self.most_pending
        self.cache = self.network.new_cache(len(prompts), capacity)
        logits = prefill(self.network, self.cache, tokens, lengths, self._heads)
        self._following = self._chooser.first(logits[0])
        one = torch.ones_like(self._following)
        self._chooser.see(self._following.unsqueeze(1), one.unsqueeze(1))
        self._draft(logits[1:])
        return self._step(self._following.unsqueeze(1), one, logits[0].unsqueeze(1))

    @torch.inference_mode()
    def step(self) -> Step:
        """One forward: verify the drafts, commit those that are kept, draft again."""
        width = wide_enough(max(self._used) + self._heads, self.cache.capacity)
        pending = self._following.unsqueeze(1)
        if self._heads > 1:
            pending = torch.cat([pending, self._drafts.tokens], dim=1)
        block = self.network.following(self.cache, self._heads, width)
        trunk_output = self.network.trunk(pending, self.cache, block)
        self.network.fill_heads(trunk_output, self._heads, self.cache, block)
        hidden = self._run_heads(trunk_output, block)
        logits = self.network.logits(hidden[0]).unflatten(0, pending.shape)
        kept, self._following = self._chooser.verify(logits, self._drafts)
        new = kept + 1
        tokens = pending.roll(-1, dims=1).scatter(
            1, kept.unsqueeze(1), self._following.unsqueeze(1)
        )
        columns = self.network.numbers(self._heads)
        self._chooser.see(tokens, columns < new.unsqueeze(1))
        self.cache.lengths = self.cache.lengths + new
        if self._heads > 1:
            self._draft(self._others_at(kept, hidden, trunk_output, block))
        step = self._step(tokens, new, logits)
        self._used = [u + len(n) for u, n in zip(self._used, step.tokens, strict=True)]
        return step

    @torch.inference_mode()
    def keep(self, order: Sequence[int]) -> None:
        """Let rows leave: row `order[i]` becomes row i, the others are gone."""
        self._used = [self._used[row] for row in order]
        self.cache.keep(order, max(self._used))
        self._chooser.keep(order)
        rows = list(order)
        self._following = self._following[rows]
        tokens, distributions = self._drafts
        self._drafts = Drafts(tokens[rows], None if distributions is None else distributions[rows])

    def _new_chooser(self, seeds: Sequence[int]) -> Chooser:
        vocab_size = self.network.config.vocab_size
        return Chooser(self.sampling, seeds, vocab_size, self.network.device)

    def _run_heads(self, trunk_output: Tensor, block: Block) -> Tensor:
        """Head 1 at all positions; where these are few, the other heads as well.

        Args:
            trunk_output: z `[B * S, H]`.
            block: of the same positions, whose keys and values are in the cache.

        Returns:
            `[1 or k, B * S, H]`.
        """
        together = trunk_output.shape[0] <= _TOGETHER
        last = self._heads if together else 1
        return self.network.heads(trunk_output, 1, last, self.cache, block)

    def _others_at(
        self, columns: Tensor, hidden: Tensor, trunk_output: Tensor, block: Block
    ) -> Tensor:
        """Logits `[k - 1, B, V]` of heads 2 .. k at one position of each row.

        Args:
            columns: `[B]` which of a row's S positions.
            hidden: what `_run_heads` gave.
            trunk_output: z `[B * S, H]`.
            block: of the S positions.
        """
        positions = trunk_output.shape[0] // block.rows
        chosen = self.network.numbers(block.rows) * positions + columns
        if len(hidden) > 1:
            return self.network.logits(hidden[1:, chosen])
        at = block.at(columns)
        there = self.network.heads(trunk_output[chosen], 2, self._heads, self.cache, at)
        return self.network.logits(there)

    def _draft(self, logits: Tensor) -> None:
        """Draw drafts from logits `[k - 1, B, V]` of heads 2 .. k."""
        if self._heads > 1:
            self._drafts = self._chooser.draft(logits)
        else:
            self._drafts = Drafts(self._following.new_empty(logits.shape[1], 0), None)

    def _step(self, tokens: Tensor, new: Tensor, logits: Tensor) -> Step:
        """Bring a step to the host, in one transfer.

        Args:
            tokens: `[B, S]`.
            new: `[B]` how many of them, from the first, are the step's.
            logits: `[B, S, V]` of head 1, each from which the token was chosen.
        """
        counts = torch.where(self._chooser.sound, new, -1).unsqueeze(1)
        blocks = torch.cat([counts, tokens], dim=1).tolist()
        if min(block[0] for block in blocks) < 0:
            raise CheckpointError(
                "the model's logits are not finite, so nothing can be drawn from them; its weights "
                "are damaged or the temperature is too low: check the export, or use temperature 0"
            )
        logprobs = None
        if self.logprobs:
            each = torch.log_softmax(logits.float(), dim=-1).gather(-1, tokens.unsqueeze(-1))
            rows = each.squeeze(-1).tolist()
            logprobs = [row[: block[0]] for row, block in zip(rows, blocks, strict=True)]
        return Step([block[1 : 1 + block[0]] for block in blocks], logprobs)
