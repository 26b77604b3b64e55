"""Decodes a batch to its end: rows that have ended leave it, and no row waits for another."""

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple, Protocol

from model.decoding.chain import ChainDecoder, Step
from model.decoding.sampling import GREEDY, Sampling
from model.decoding.stopping import Ending, StopStrings
from model.inference.network import Network


class Decoder(Protocol):
    """A way of decoding."""

    def prefill(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Step:
        """Read the prompts; the first tokens of each row."""
        ...

    def step(self) -> Step:
        """One forward; the next tokens of each row, at least one."""
        ...

    def keep(self, order: Sequence[int]) -> None:
        """Row `order[i]` becomes row i, the others are gone."""
        ...


class Piece(NamedTuple):
    """What one forward gave one text.

    Attributes:
        row: number of its prompt, from 0.
        tokens: its new tokens, at least one.
        logprobs: of each; None unless the decoder gives them.
        forward: number of the forward, from 1; the first one reads the prompts.
    """

    row: int
    tokens: list[int]
    logprobs: list[float] | None
    forward: int


class Generation(NamedTuple):
    """What was generated and what it took.

    Attributes:
        blocks: for each prompt, the new tokens of each of its forwards. The first forward reads the
            prompt and gives one token; a text takes part in no more forwards once it has ended.
        forwards: forwards of the whole batch.
        logprobs: for each prompt, of each of its tokens by head 1 itself; None unless asked for.
    """

    blocks: list[list[list[int]]]
    forwards: int
    logprobs: list[list[float]] | None = None

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


def stream(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_id: int | Collection[int] | None = None,
    stop: StopStrings | None = None,
) -> Iterator[Piece]:
    """Continue each prompt, giving pieces as they come.

    Args:
        decoder: a way of decoding.
        prompts: token ids, at least one in each prompt; lengths may differ.
        max_new_tokens: limit for each prompt, at least 1.
        eos_id: token, or tokens, that end a text, wherever in a block; None = no token does.
        stop: ends a text with the token that completes one of its strings.
    """
    assert max_new_tokens >= 1, max_new_tokens
    assert all(len(prompt) >= 1 for prompt in prompts), "empty prompt"
    endings = [Ending(max_new_tokens, eos_id, stop) for _ in prompts]
    rows = list(range(len(prompts)))
    forward = 1
    step = decoder.prefill(prompts, max_new_tokens)
    while True:
        for place, row in enumerate(rows):
            count = endings[row].take(step.tokens[place])
            logprobs = None if step.logprobs is None else step.logprobs[place][:count]
            yield Piece(row, step.tokens[place][:count], logprobs, forward)
        order = _staying([not endings[row].ended for row in rows])
        if not order:
            return
        if len(order) < len(rows):
            decoder.keep(order)
            rows = [rows[place] for place in order]
        step = decoder.step()
        forward += 1


def generate(
    network: Network,
    prompts: Sequence[Sequence[int]],
    *,
    heads: int,
    max_new_tokens: int,
    eos_id: int | Collection[int] | None = None,
    sampling: Sampling = GREEDY,
    seeds: Sequence[int] | None = None,
    stop: StopStrings | None = None,
    logprobs: bool = False,
) -> Generation:
    """Continue each prompt by chains of drafts until its text ends.

    Greedy-exact at temperature 0, else distribution-exact, whatever the number of heads.

    Args:
        network: the model.
        prompts: token ids, at least one in each prompt; lengths may differ.
        heads: k, how many heads to use; 1 is plain autoregressive decoding.
        max_new_tokens: limit for each prompt, at least 1.
        eos_id: token, or tokens, that end a text, wherever in a block; None = no token does.
        sampling: how tokens are chosen; the likeliest unless given.
        seeds: one for each prompt; its text depends on its own alone.
        stop: strings that end a text.
        logprobs: whether to give the tokens' logarithmic probabilities.
    """
    decoder = ChainDecoder(network, heads=heads, sampling=sampling, seeds=seeds, logprobs=logprobs)
    pieces = stream(decoder, prompts, max_new_tokens=max_new_tokens, eos_id=eos_id, stop=stop)
    return collect(pieces, len(prompts))


def collect(pieces: Iterator[Piece], num_prompts: int) -> Generation:
    """All pieces of a stream."""
    blocks: list[list[list[int]]] = [[] for _ in range(num_prompts)]
    logprobs: list[list[float]] = [[] for _ in range(num_prompts)]
    forwards = 0
    for piece in pieces:
        blocks[piece.row].append(piece.tokens)
        logprobs[piece.row] += piece.logprobs or []
        forwards = piece.forward
    return Generation(blocks, forwards, logprobs if any(logprobs) else None)


def _staying(active: Sequence[bool]) -> list[int]:
    """The order in which rows stay: the last ones take the places of those that leave.

    So that few rows move. Example: of 0 1 2 3 4 the rows 1 and 2 leave: 0 4 3.
    """
    order = list(range(len(active)))
    place = 0
    while place < len(order):
        if active[order[place]]:
            place += 1
            continue
        last = order.pop()
        if place < len(order):
            order[place] = last
    return order
