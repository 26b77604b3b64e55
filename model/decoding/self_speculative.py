"""Self-speculative decoding: the model's own heads draft, its head 1 verifies (Gloeckle et al.).

One forward does both. It runs over the last committed token and the drafts that follow it; head 1
says which drafts were right and what comes after them, heads 2 .. k draft the next block:

    pending    x    d1   d2   d3        positions m-1 .. m+2
    head 1     y0   y1   y2   y3        d1 = y0, d2 = y1, d3 != y2: two drafts are kept,
    commit     d1   d2   y2             y2 follows them, d3 is forgotten
    next       y2   e1   e2   e3        e1 .. e3: heads 2 .. 4 at the position of d2

Greedy decoding gives, token for token, what head 1 alone would give. Sampling draws from
the distribution of head 1 alone (speculative sampling, Leviathan et al. 2023, Chen et al. 2023).

Legend: B batch, k heads in use, S positions of one forward, V vocabulary, H hidden.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from model.decoding.kv_cache import KVCache
from model.errors import CheckpointError


class Decodable(Protocol):
    """What decoding asks of a model, see `model.language_model.MultiTokenModel`."""

    def decode(
        self,
        tokens: Tensor,
        cache: KVCache,
        heads: Sequence[int],
        positions: Tensor | None = None,
    ) -> Tensor:
        """Head outputs `[len(heads), B, P or S, H]` at new positions, extending the cache."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., V]` from `[..., H]`."""
        ...


class Generation(NamedTuple):
    """What was generated and what it took.

    Attributes:
        blocks: for each prompt, the new tokens of each of its forwards. The first forward reads the
            prompt and gives one token; a text takes part in no more forwards once it has ended.
        forwards: forwards of the whole batch.
    """

    blocks: list[list[list[int]]]
    forwards: int

    @property
    def tokens(self) -> list[list[int]]:
        """The new tokens after each prompt; an end-of-text token, if one came, is the last."""
        return [[token for block in blocks for token in block] for blocks in self.blocks]

    @property
    def num_tokens(self) -> int:
        """New tokens after all prompts."""
        return sum(map(len, self.tokens))

    @property
    def tokens_per_forward(self) -> float:
        """Mean tokens that a forward after the prompt's gave a text, from 1 to k."""
        later = [len(block) for blocks in self.blocks for block in blocks[1:]]
        return sum(later) / len(later) if later else 1.0


class Drafts(NamedTuple):
    """Tokens drawn from several distributions at once.

    Attributes:
        tokens: `[B, P]`.
        distributions: `[B, P, V]` what each was drawn from; None when greedy.
    """

    tokens: Tensor
    distributions: Tensor | None


class Verdict(NamedTuple):
    """What became of a block of drafts.

    Attributes:
        kept: `[B]` how many drafts, from the first, are kept.
        following: `[B]` the token after the kept ones.
    """

    kept: Tensor
    following: Tensor


class ChainProbabilities(NamedTuple):
    """Speculative sampling of one chain of g drafts, as probabilities.

    Attributes:
        accept: `[..., g]` of keeping draft j, once all before it were kept.
        following: `[..., g + 1, V]` distribution of the next token when exactly j drafts were kept.
    """

    accept: Tensor
    following: Tensor


def accept_chain(target: Tensor, draft: Tensor, tokens: Tensor) -> ChainProbabilities:
    """How drafts are accepted so that what is committed has the target's distribution.

    Draft j is kept with probability min(1, p_j(d_j) / q_j(d_j)); at the first that is not, the
    next token comes from the normalized positive part of p_j - q_j; after the last, from p_{g+1}.
    Exact for any q that was fixed before its draw.

    Args:
        target: `[..., g + 1, V]` distributions p of head 1, draft j's at index j - 1.
        draft: `[..., g, V]` distributions q that the drafts were drawn from.
        tokens: `[..., g]` the drafts.

    Returns:
        Acceptance probabilities and distributions of the following token.
    """
    chosen = tokens.unsqueeze(-1)
    wanted = target[..., :-1, :].gather(-1, chosen).squeeze(-1)
    drawn = draft.gather(-1, chosen).squeeze(-1)
    accept = torch.where(drawn > 0, wanted / drawn, 0.0).clamp(max=1.0)
    excess = (target[..., :-1, :] - draft).clamp(min=0)
    total = excess.sum(-1, keepdim=True)
    # No excess means p = q up to rounding: then the drafts are accepted, and p itself is as good.
    rest = torch.where(total > 0, excess / total, target[..., :-1, :])
    return ChainProbabilities(accept, torch.cat([rest, target[..., -1:, :]], dim=-2))


class _Greedy:
    """The likeliest token; drafts are kept while they are the likeliest."""

    def draw(self, logits: Tensor) -> Drafts:
        return Drafts(logits.argmax(-1), None)

    def verify(self, logits: Tensor, drafts: Drafts) -> Verdict:
        best = logits.argmax(-1)
        kept = _leading(best[:, :-1] == drafts.tokens)
        return Verdict(kept, best.gather(1, kept.unsqueeze(1)).squeeze(1))


class _Sampling:
    """Tokens from softmax(logits / temperature); drafts are kept as `accept_chain` says."""

    def __init__(self, temperature: float, generator: torch.Generator) -> None:
        self.temperature = temperature
        self.generator = generator

    def draw(self, logits: Tensor) -> Drafts:
        distributions = self._distributions(logits)
        return Drafts(self._sample(distributions), distributions)

    def verify(self, logits: Tensor, drafts: Drafts) -> Verdict:
        assert drafts.distributions is not None
        chain = accept_chain(self._distributions(logits), drafts.distributions, drafts.tokens)
        chances = torch.rand(chain.accept.shape, generator=self.generator, device=logits.device)
        kept = _leading(chances < chain.accept)
        batch = torch.arange(kept.shape[0], device=kept.device)
        return Verdict(kept, self._sample(chain.following[batch, kept].unsqueeze(1)).squeeze(1))

    def _distributions(self, logits: Tensor) -> Tensor:
        scaled = logits.float() / self.temperature
        if not bool(scaled.isfinite().all()):
            raise CheckpointError(
                "the model's logits are not finite, so nothing can be drawn from them; its weights "
                "are damaged or the temperature is too low: check the export, or use temperature 0"
            )
        return torch.softmax(scaled, dim=-1)

    def _sample(self, distributions: Tensor) -> Tensor:
        """One token `[B, P]` from each distribution `[B, P, V]`."""
        shape = distributions.shape[:2]
        if not distributions.shape[1]:
            return torch.empty(shape, dtype=torch.long, device=distributions.device)
        flat = torch.multinomial(distributions.flatten(0, 1), 1, generator=self.generator)
        return flat.view(shape)


def _leading(right: Tensor) -> Tensor:
    """`[B]` number of true values before the first false one in each row of `[B, g]`."""
    return right.long().cumprod(1).sum(1)


class Decoder:
    """A batch being decoded; `prefill` once, then `step` until every sequence has what it needs.

    Sequences advance unevenly and do not influence one another.

    Args:
        model: the model.
        heads: k, how many of its heads to use; 1 is plain autoregressive decoding.
        temperature: 0 = greedy.
        generator: random generator on the model's device, for a temperature above 0.
    """

    def __init__(
        self,
        model: Decodable,
        *,
        heads: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        assert heads >= 1, heads
        assert temperature >= 0, temperature
        self.model = model
        self.heads = range(1, heads + 1)
        self.rule: _Greedy | _Sampling = _Greedy()
        if temperature > 0:
            assert generator is not None, "a temperature above 0 needs a generator"
            self.rule = _Sampling(temperature, generator)

    def prefill(self, prompts: Tensor, lengths: Tensor, capacity: int) -> Tensor:
        """Read the prompts.

        Args:
            prompts: `[B, S]`, padded on the right with any token.
            lengths: `[B]` of each prompt, at least 1.
            capacity: positions that each sequence may reach, rejected drafts included.

        Returns:
            `[B]` the first new token of each sequence.
        """
        self.cache = KVCache(prompts.shape[0], capacity, prompts.device)
        last = (lengths - 1).unsqueeze(1)
        hidden = self.model.decode(prompts, self.cache, self.heads, last)
        self.cache.commit(lengths)
        self.following = self.rule.draw(self.model.logits(hidden[0])).tokens[:, 0]
        self._draft(hidden[1:, :, 0])
        return self.following

    def step(self, active: Tensor) -> tuple[Tensor, Tensor]:
        """One forward: verify the drafts, commit those that are accepted, draft again.

        Args:
            active: `[B]` bool; sequences that are not stay as they are.

        Returns:
            `[B, k]` tokens and `[B]` how many of them, from the first, are new in each sequence.
        """
        pending = torch.cat([self.following.unsqueeze(1), self.drafts.tokens], dim=1)
        hidden = self.model.decode(pending, self.cache, self.heads)
        verdict = self.rule.verify(self.model.logits(hidden[0]), self.drafts)
        new = torch.where(active, verdict.kept + 1, 0)
        self.cache.commit(self.cache.lengths + new)
        tokens = torch.cat([pending[:, 1:], pending[:, :1]], dim=1)
        tokens = tokens.scatter(1, verdict.kept.unsqueeze(1), verdict.following.unsqueeze(1))
        self.following = torch.where(active, verdict.following, self.following)
        batch = torch.arange(pending.shape[0], device=pending.device)
        self._draft(hidden[1:, batch, verdict.kept])
        return tokens, new

    def _draft(self, hidden: Tensor) -> None:
        """Draw drafts from the outputs `[k - 1, B, H]` of heads 2 .. k at the last position."""
        self.drafts = self.rule.draw(self.model.logits(hidden.transpose(0, 1)))


@torch.no_grad()
def generate(
    model: Decodable,
    prompts: Sequence[Sequence[int]],
    *,
    heads: int,
    max_new_tokens: int,
    eos_id: int | None = None,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> Generation:
    """Continue each prompt until the end-of-text token or `max_new_tokens`.

    Greedy-exact at temperature 0, else distribution-exact, whatever the number of heads.

    Args:
        model: the model.
        prompts: token ids, at least one in each prompt; lengths may differ.
        heads: k, how many heads to use.
        max_new_tokens: limit for each prompt, at least 1.
        eos_id: ends a text, wherever in a block it comes; None = nothing does.
        temperature: 0 = greedy.
        generator: random generator on `device`, for a temperature above 0.
        device: where the model is.
    """
    assert max_new_tokens >= 1, max_new_tokens
    assert all(len(prompt) >= 1 for prompt in prompts), "empty prompt"
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = int(lengths.max())
    padded = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
    decoder = Decoder(model, heads=heads, temperature=temperature, generator=generator)
    # A text may end with up to k - 1 kept drafts too many, and reads k more while others continue.
    capacity = longest + max_new_tokens + 2 * heads
    first = decoder.prefill(torch.tensor(padded, device=device), lengths, capacity)
    texts = [_Continuation(max_new_tokens, eos_id) for _ in prompts]
    for text, token in zip(texts, first.tolist(), strict=True):
        text.extend([token])
    forwards = 1
    while any(text.active for text in texts):
        active = torch.tensor([text.active for text in texts], device=device)
        tokens, new = decoder.step(active)
        forwards += 1
        for text, block, count in zip(texts, tokens.tolist(), new.tolist(), strict=True):
            text.extend(block[:count])
    return Generation([text.blocks for text in texts], forwards)


class _Continuation:
    """The new tokens after one prompt, cut at the end of the text."""

    def __init__(self, max_new_tokens: int, eos_id: int | None) -> None:
        self.blocks: list[list[int]] = []
        self.active = True
        self._room = max_new_tokens
        self._eos_id = eos_id

    def extend(self, block: list[int]) -> None:
        """Add what one forward gave; no-op once the text has ended."""
        if not self.active:
            return
        block = block[: self._room]
        if self._eos_id in block:
            block = block[: block.index(self._eos_id) + 1]
            self.active = False
        self._room -= len(block)
        self.active = self.active and self._room > 0
        self.blocks.append(block)
