"""Decodes some prompts to their ends, all of them from the start."""

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from model.decoding.batch import Batch, Decoder, Piece, Request
from model.decoding.chain import ChainDecoder
from model.decoding.sampling import GREEDY, Sampling
from model.decoding.stopping import StopStrings
from model.inference.network import Network


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
    requests = {
        row: Request(prompt, max_new_tokens, eos_id, stop, options)
        for row, (prompt, options) in enumerate(
            zip(prompts, decoder.options(len(prompts)), strict=True)
        )
    }
    batch = Batch(decoder, len(prompts), max(map(len, prompts)) + max_new_tokens)
    yield from batch.join(requests)
    while batch.rows:
        yield from batch.step()


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
