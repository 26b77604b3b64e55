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

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from model.decoding.choosing import Chooser, Drafts
from model.decoding.sampling import GREEDY, Sampling
from model.errors import CheckpointError
from model.inference.cache import Block, Cache, wide_enough
from model.inference.network import Network
from model.inference.prefill import prefill

# Up to so many positions, heads 2 .. k run at all of them beside head 1, though one of each row is
# of use: a second pass of few rows costs as much as the operations it consists of.
_TOGETHER = 16


class RowOptions(NamedTuple):
    """How one row is decoded.

    Attributes:
        sampling: how head 1 chooses.
        seed: of its random numbers.
        likeliest: logarithmic probabilities are given, of each token and of so many likeliest ones
            at its place; None = none are.
    """

    sampling: Sampling = GREEDY
    seed: int = 0
    likeliest: int | None = None


class Step(NamedTuple):
    """What one forward gave each row.

    Attributes:
        tokens: for each row its new tokens.
        logprobs: for each row their logarithmic probabilities by head 1 itself, before
            temperature and penalty; None unless a row asked for them.
        likeliest: for each row and token the likeliest tokens there with their logarithmic
            probabilities, as many as any row asked for; None likewise.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]] | None
    likeliest: list[list[list[tuple[int, float]]]] | None = None


def unsound() -> CheckpointError:
    """What to raise of a model whose distributions are none."""
    return CheckpointError(
        "the model's logits are not finite, so nothing can be drawn from them; its weights "
        "are damaged or the temperature is too low: check the export, or use temperature 0"
    )


class ChainDecoder:
    """A batch that is decoded by chains of drafts; with one head plain autoregressive decoding.

    Class: greedy-exact at temperature 0, else distribution-exact. Rows join and leave between
    steps, advance unevenly and do not influence one another.

    Args:
        network: the model.
        heads: k, how many of its heads to use.
        sampling: how head 1 chooses, in rows that `prefill` begins.
        seeds: of these, one for each row; 0, 1, .. unless given.
        logprobs: whether to compute them for these.

    Attributes:
        most_pending: tokens of a step's forward in each row, at most.
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
        self._most_heads = self._heads = heads
        self._seeds = seeds
        self.cache: Cache
        self._rows: list[RowOptions] = []
        self._used: list[int] = []
        self._chooser: Chooser
        self._following: Tensor
        self._drafts: Drafts

    def options(self, rows: int) -> list[RowOptions]:
        """Those of rows whose own are not given."""
        seeds = range(rows) if self._seeds is None else self._seeds
        likeliest = 0 if self.logprobs else None
        return [RowOptions(self.sampling, seed, likeliest) for seed in seeds]

    def open(self, rows: int, capacity: int) -> None:
        """Make room for `rows` rows at once of `capacity` tokens each; none is there yet."""
        capacity += self.most_pending
        self.cache = self.network.new_cache(rows, capacity, self._most_heads)
        self.cache.lengths = self.cache.lengths[:0]
        self._rows, self._used = [], []

    def use_heads(self, heads: int) -> None:
        """Draft with so many heads, at most those it was made with, from the next step on."""
        assert 1 <= heads <= self._most_heads, heads
        self._heads = heads

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Step:
        """Begin a batch: `open` it and let all rows join.

        Args:
            prompts: of every row, at least one token each.
            max_new_tokens: for how many tokens of each row there must be room.

        Returns:
            The first new token of each row.
        """
        self.open(len(prompts), max(map(len, prompts)) + max_new_tokens)
        return self.join(prompts, self.options(len(prompts)))

    @torch.inference_mode()
    def join(self, prompts: Sequence[Sequence[int]], rows: Sequence[RowOptions]) -> Step:
        """Let rows join, after those that are there.

        Args:
            prompts: of the new rows, at least one token each.
            rows: how each is decoded.

        Returns:
            The first new token of each new row.
        """
        new = self._beside(len(prompts))
        step = new._read(prompts, rows)
        self._absorb(new)
        return step

    def _beside(self, rows: int) -> Self:
        """The same decoder over the next rows of the cache alone."""
        new = copy.copy(self)
        new.cache = self.cache.beside(rows)
        return new

    def _absorb(self, new: Self) -> None:
        """Take over the rows of a decoder that `_beside` gave."""
        if self._rows:
            self._chooser.join(new._chooser)
            self._following = torch.cat([self._following, new._following])
            self._drafts = self._drafts.joined(new._drafts)
        else:
            self._chooser, self._following = new._chooser, new._following
            self._drafts = new._drafts
        self._rows, self._used = self._rows + new._rows, self._used + new._used
        self.cache.absorb(new.cache)

    def _read(self, prompts: Sequence[Sequence[int]], rows: Sequence[RowOptions]) -> Step:
        """Read the prompts into an empty cache; the first new token of each row."""
        device = self.network.device
        self._rows = list(rows)
        self._used = [len(prompt) for prompt in prompts]
        longest = max(self._used)
        padded = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
        tokens = torch.tensor(padded, device=device)
        lengths = torch.tensor(self._used, device=device)
        self._chooser = self._new_chooser(rows)
        self._chooser.see(tokens, torch.arange(longest, device=device) < lengths.unsqueeze(1))
        logits = prefill(self.network, self.cache, tokens, lengths, self._most_heads)
        self._following = self._chooser.first(logits[0])
        one = torch.ones_like(self._following)
        self._chooser.see(self._following.unsqueeze(1), one.unsqueeze(1))
        self._draft(logits[1 : self._heads])
        return self._step(self._following.unsqueeze(1), one, logits[0].unsqueeze(1))

    @torch.inference_mode()
    def step(self) -> Step:
        """One forward: verify the drafts, commit those that are kept, draft again."""
        width = wide_enough(max(self._used) + self.most_pending, self.cache.capacity)
        pending = self._following.unsqueeze(1)
        if self._drafts.tokens.shape[1]:
            pending = torch.cat([pending, self._drafts.tokens], dim=1)
        block = self.network.following(self.cache, pending.shape[1], width)
        trunk_output = self._run_trunk(pending, block)
        trunk_output = self.network.fill_heads(trunk_output, self._most_heads, self.cache, block)
        hidden = self._run_heads(trunk_output, block)
        logits = self.network.logits(hidden[0]).unflatten(0, pending.shape)
        kept, self._following = self._chooser.verify(logits, self._drafts)
        new = kept + 1
        tokens = pending.roll(-1, dims=1).scatter(
            1, kept.unsqueeze(1), self._following.unsqueeze(1)
        )
        columns = self.network.numbers(pending.shape[1])
        self._chooser.see(tokens, columns < new.unsqueeze(1))
        self.cache.lengths = self.cache.lengths + new
        self._draft_after(kept, pending, lambda: self._others_at(kept, hidden, trunk_output, block))
        step = self._step(tokens, new, logits)
        self._used = [u + len(n) for u, n in zip(self._used, step.tokens, strict=True)]
        return step

    @torch.inference_mode()
    def keep(self, order: Sequence[int]) -> None:
        """Let rows leave: row `order[i]` becomes row i, the others are gone."""
        self._rows = [self._rows[row] for row in order]
        self._used = [self._used[row] for row in order]
        self.cache.keep(order, max(self._used, default=0))
        self._chooser.keep(order)
        self._following = self._following[list(order)]
        self._drafts = self._drafts.keep(order)

    def _new_chooser(self, rows: Sequence[RowOptions]) -> Chooser:
        vocab_size = self.network.config.vocab_size
        samplings, seeds = [row.sampling for row in rows], [row.seed for row in rows]
        return Chooser(samplings, seeds, vocab_size, self.network.device)

    def _run_trunk(self, pending: Tensor, block: Block) -> Tensor:
        """The trunk at the pending tokens `[B, S]`; `[B * S, H]`."""
        return self.network.trunk(pending, self.cache, block)

    def _run_heads(self, trunk_output: Tensor, block: Block) -> Tensor:
        """Head 1 at all positions; where these are few, the other heads as well.

        Args:
            trunk_output: what `fill_heads` gave, `[..., B * S, H]`.
            block: of the same positions, whose keys and values are in the cache.

        Returns:
            `[1 or k, B * S, H]`.
        """
        together = trunk_output.shape[-2] <= _TOGETHER
        last = self._heads if together else 1
        return self.network.heads(trunk_output, 1, last, self.cache, block)

    def _others_at(
        self, columns: Tensor, hidden: Tensor, trunk_output: Tensor, block: Block
    ) -> Tensor:
        """Logits `[k - 1, B, V]` of heads 2 .. k at one position of each row.

        Args:
            columns: `[B]` which of a row's S positions.
            hidden: what `_run_heads` gave.
            trunk_output: what `fill_heads` gave, `[..., B * S, H]`.
            block: of the S positions.
        """
        positions = trunk_output.shape[-2] // block.rows
        chosen = self.network.numbers(block.rows) * positions + columns
        if len(hidden) > 1:
            return self.network.head_logits(hidden[1:, chosen], 2)
        at, states = block.at(columns), trunk_output[..., chosen, :]
        there = self.network.heads(states, 2, self._heads, self.cache, at)
        return self.network.head_logits(there, 2)

    def _draft_after(self, kept: Tensor, pending: Tensor, others: Callable[[], Tensor]) -> None:
        """Draft the next block.

        Args:
            kept: `[B]` how many drafts of this one are.
            pending: `[B, S]` its tokens.
            others: computes logits `[k - 1, B, V]` of heads 2 .. k at the last kept position.
        """
        if self._heads > 1:
            self._draft(others())
        elif self._drafts.tokens.shape[1]:
            self._drafts = Drafts(kept.new_empty(len(kept), 0), None)

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
            raise unsound()
        new_tokens = [block[1 : 1 + block[0]] for block in blocks]
        wanted = [row.likeliest for row in self._rows if row.likeliest is not None]
        if not wanted:
            return Step(new_tokens, None)
        return Step(new_tokens, *_logprobs(logits, tokens, [*map(len, new_tokens)], max(wanted)))


def _logprobs(
    logits: Tensor, tokens: Tensor, counts: Sequence[int], likeliest: int
) -> tuple[list[list[float]], list[list[list[tuple[int, float]]]]]:
    """Logarithmic probabilities of tokens and of the likeliest ones, see `Step`.

    Args:
        logits: `[B, S, V]`.
        tokens: `[B, S]`.
        counts: how many of a row's tokens, from the first, are of interest.
        likeliest: how many.
    """
    every = torch.log_softmax(logits.float(), dim=-1)
    own = every.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).tolist()
    best = every.topk(min(likeliest, every.shape[-1]), dim=-1)
    listed = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    others = [
        [list(zip(i, v, strict=True)) for i, v in zip(row_ids, row_values, strict=True)]
        for row_ids, row_values in listed
    ]
    return (
        [row[:count] for row, count in zip(own, counts, strict=True)],
        [row[:count] for row, count in zip(others, counts, strict=True)],
    )
