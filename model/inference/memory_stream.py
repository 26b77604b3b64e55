"""A model with a memory reads a stream of tokens, in pieces of any size and in constant memory.

What is kept is the cache of memories, some tokens of the segment before, and the tokens of the
present segment with their keys and values. A segment that is full is read once more in one pass,
between its two prompts, which gives its memory: so memories are the same bits however the stream
was cut into pieces, and logits the same up to rounding.

Legend: S new tokens, M heads that are run, H hidden, V vocabulary, N memories.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.errors import ConfigError
from model.inference.cache import Block, Cache
from model.inference.network import Network
from model.memory.prompts import retrieve


class MemoryState(NamedTuple):
    """All that a stream leaves behind; keys and values are made again from it.

    Attributes:
        memories: `[N, H]`, oldest first.
        before: the last tokens of the segment before; empty in the first one.
        segment: the tokens of the present segment, fewer than a whole one.
    """

    memories: Tensor
    before: tuple[int, ...]
    segment: tuple[int, ...]


class MemoryStream:
    """One text that is read, or written, token by token.

    Args:
        network: of a model with a memory.
        heads: how many are run at every token.
        state: of a stream to go on with; None = a new one.

    Raises:
        ConfigError: the mode of the memory needs tokens that are not there yet.
    """

    def __init__(
        self, network: Network, *, heads: int = 1, state: MemoryState | None = None
    ) -> None:
        sizes, weights = network.config.memory, network.weights.memory
        assert sizes is not None
        assert weights is not None
        if sizes.retrieval and sizes.mode != "strict_prev":
            raise ConfigError(
                f"model.memory.mode={sizes.mode} makes a segment's prompt of tokens of the segment "
                "itself, which are not there while a text is written or read in pieces; train with "
                "strict_prev"
            )
        self._network, self._heads = network, heads
        self._sizes, self._weights = sizes, weights
        self._cache: Cache | None = None
        self._memories = torch.empty(
            0, network.config.hidden_size, dtype=network.dtype, device=network.device
        )
        self._before: list[int] = []
        self._segment: list[int] = []
        if state is not None:
            self._memories = state.memories.to(self._memories)
            self._before = list(state.before)
            if state.segment:
                self._read(state.segment)

    @property
    def state(self) -> MemoryState:
        """What the stream has left behind so far."""
        return MemoryState(self._memories, tuple(self._before), tuple(self._segment))

    @torch.inference_mode()
    def feed(self, tokens: Sequence[int]) -> Tensor:
        """Read tokens; the logits `[M, S, V]` of heads 1 .. M at each of them."""
        return self._network.head_logits(torch.cat(list(self.outputs(tokens)), dim=1), 1)

    def outputs(self, tokens: Sequence[int]) -> Iterator[Tensor]:
        """Read tokens; what heads 1 .. M give at them, `[M, S', H]`, a segment at a time."""
        for part in self._parts(tokens):
            yield self._read(part)

    @torch.inference_mode()
    def last(self, tokens: Sequence[int]) -> Tensor:
        """Read tokens, at least one; the logits `[M, V]` at the last, and none of the others."""
        output = torch.empty(0)
        for part in self._parts(tokens):
            output = self._read(part)[:, -1:]
        return self._network.head_logits(output, 1).squeeze(1)

    def _parts(self, tokens: Sequence[int]) -> Iterator[Sequence[int]]:
        """Tokens cut at the borders of segments."""
        start = 0
        while start < len(tokens):
            stop = start + self._sizes.segment - len(self._segment)
            yield tokens[start:stop]
            start = stop

    @torch.inference_mode()
    def _read(self, tokens: Sequence[int]) -> Tensor:
        """Tokens that the present segment has room for; what the heads give, `[M, S, H]`."""
        if self._cache is None:
            self._open()
        assert self._cache is not None
        network, cache, begin = self._network, self._cache, len(self._segment)
        block = self._block(self._first + begin, len(tokens))
        trunk_output = network.transform(self._embed(tokens), cache, block)
        block = self._block(begin, len(tokens))  # to heads the segment begins with its tokens
        filled = network.fill_heads(trunk_output, self._heads, cache, block)
        output = network.heads(filled, 1, self._heads, cache, block)
        self._segment += tokens
        if len(self._segment) == self._sizes.segment:
            self._close()
        return output

    def _open(self) -> None:
        """Begin a segment: its prompt and the sensory tokens come first."""
        self._prompt = self._make_prompt()
        count = self._sizes.sensory
        self._sensory = self._before[len(self._before) - count :] if count else []
        self._first = 1 + len(self._sensory)
        self._cache = self._network.new_cache(1, self._first + self._sizes.segment)
        hidden = torch.cat([self._prompt, self._embed(self._sensory)])
        self._network.transform(hidden, self._cache, self._block(0, self._first))

    def _close(self) -> None:
        """End a segment: keep its memory, and the tokens that the next one needs."""
        tokens = self._embed(self._sensory + self._segment)
        memory = self._alone(torch.cat([self._prompt, tokens, self._prompt]))[-1:]
        self._memories = torch.cat([self._memories, memory])[-self._sizes.cache :]
        recent = self._sizes.recent
        self._before = self._segment[-recent:] if recent else []
        self._segment, self._cache = [], None

    def _make_prompt(self) -> Tensor:
        """`[1, H]` from the memories."""
        weights, sizes = self._weights, self._sizes
        if not len(self._memories):
            return weights.initial
        if not sizes.retrieval:
            return self._memories[-1:]
        assert weights.summary is not None
        tokens = self._embed(self._before[-sizes.summary :])
        summary = self._alone(torch.cat([weights.summary, tokens, weights.summary]))[-1:]
        return retrieve(weights, summary, self._memories.unsqueeze(1))

    def _alone(self, hidden: Tensor) -> Tensor:
        """A pass of the trunk over embeddings `[S, H]` that keeps nothing."""
        cache = self._network.new_cache(1, len(hidden))
        positions = torch.arange(len(hidden), device=self._network.device).unsqueeze(0)
        block = self._network.block(cache, positions, positions, None, cache.capacity)
        return self._network.transform(hidden, cache, block)

    def _block(self, start: int, count: int) -> Block:
        """New positions of the present segment's cache."""
        assert self._cache is not None
        width = self._cache.capacity
        positions = torch.arange(start, start + count, device=self._network.device)
        unseen = self._network.numbers(width) > positions.unsqueeze(1)
        places = positions.unsqueeze(0)
        return self._network.block(self._cache, places, places, unseen.unsqueeze(0), width)

    def _embed(self, tokens: Sequence[int]) -> Tensor:
        ids = torch.tensor(list(tokens), dtype=torch.long, device=self._network.device)
        return F.embedding(ids, self._network.weights.embedding)
