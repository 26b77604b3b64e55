"""The segments of a batch one after the other, each with the prompt made of earlier memories.

    S = trunk([T | summary's tokens | T])[last]            what the segment is about
    P = retrieve(S, memories)                              the prompt
    H = trunk([P | sensory tokens | segment | P])          z of the segment, and its memory H[last]

What the heads read and what becomes a memory is the trunk's output: residual stream, without a
norm, the same for all heads. Positions count from 0 in every pass through the trunk.

Legend: B batch, S sequence, H hidden, L segment length, N memories.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from model.memory.prompts import MemoryWeights, retrieve, with_gradients
from model.memory.sizes import MemorySizes


class SegmentReader(Protocol):
    """What passes segments through the trunk."""

    def embed(self, tokens: Tensor) -> Tensor:
        """Ids `[B, S]` to `[S, B, H]`."""
        ...

    def transform(self, hidden: Tensor, documents: Tensor | None) -> Tensor:
        """The trunk's layers over `[S, B, H]`, causal and, with `documents [B, S]`, within each."""
        ...


class Window(NamedTuple):
    """Segments that are run with gradients, and those of them whose losses are taken.

    Attributes:
        first: number of the first segment that is run; memories before it are only values.
        scored: of the first whose output is wanted.
        stop: after the last.
    """

    first: int
    scored: int
    stop: int


def windows(sizes: MemorySizes, length: int) -> list[Window]:
    """The windows through which the gradient of every segment's loss goes D segments back.

    Losses of the first D + 1 segments share one window, since the gradients of all of them reach
    the first segment and no further. Each later segment has a window of its own, with the D
    segments before it run again: no more than D + 1 segments are kept for backward, and nothing
    reaches a memory that is older.

    Example: 5 segments and D = 1 give (0, 0, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5).

    Args:
        sizes: of the memory.
        length: tokens of a sequence.
    """
    count, depth = sizes.num_segments(length), sizes.bptt
    first = Window(0, 0, min(depth + 1, count))
    return [first] + [Window(m - depth, m, m + 1) for m in range(first.stop, count)]


def unroll(
    reader: SegmentReader,
    weights: MemoryWeights,
    sizes: MemorySizes,
    tokens: Tensor,
    memories: list[Tensor],
    *,
    documents: Tensor | None = None,
    window: Window | None = None,
) -> Tensor:
    """Run the segments of a window, or all.

    Args:
        reader: of segments.
        weights: of the memory.
        sizes: of the memory.
        tokens: `[B, S]` ids of the whole sequence.
        memories: `[B, H]` of the sequence's segments so far, without a graph, at least of those
            before the window; those of the window's segments are added.
        documents: `[B, S]` integers, rising: nothing of one document reaches another. None: each
            sequence is one text.
        window: which segments; None = all.

    Returns:
        `[S', B, H]` the trunk's output at the tokens of the scored segments.
    """
    window = window or Window(0, 0, sizes.num_segments(tokens.shape[1]))
    passes = _Passes(reader, weights, sizes, tokens, documents, window)
    known = list(memories[: window.first])
    outputs = []
    for number in range(window.first, window.stop):
        prompt = passes.prompt(number, known[-sizes.cache :])
        output, memory = passes.read(number, prompt)
        known.append(memory)
        if number >= window.scored:
            outputs.append(output)
        if number == len(memories):
            memories.append(memory.detach())
    return with_gradients(torch.cat(outputs), weights)


class _Passes:
    """The passes of a window's segments through the trunk; arguments as of `unroll`."""

    def __init__(
        self,
        reader: SegmentReader,
        weights: MemoryWeights,
        sizes: MemorySizes,
        tokens: Tensor,
        documents: Tensor | None,
        window: Window,
    ) -> None:
        self._reader = reader
        self._weights = weights
        self._sizes = sizes
        self._documents = documents
        self._rows, self._length = tokens.shape
        # All embeddings at once; those of `_start` come first.
        self._start = max(0, window.first * sizes.segment - sizes.recent)
        self._embedded = reader.embed(tokens[:, self._start : window.stop * sizes.segment])

    def prompt(self, number: int, memories: list[Tensor]) -> Tensor:
        """`[B, H]` for a segment, from the memories `[B, H]` that are kept before it."""
        initial = self._weights.initial.expand(self._rows, -1)
        if not memories:
            return initial
        foreign = self._foreign(number, len(memories))
        if self._sizes.retrieval:
            return retrieve(
                self._weights, self._summary(number), torch.stack(memories), hidden=foreign
            )
        if foreign is None:
            return memories[-1]
        return torch.where(foreign[-1].unsqueeze(1), initial, memories[-1])

    def read(self, number: int, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """A segment between its prompts: z `[L, B, H]` of its tokens, and its memory `[B, H]`.

        With documents the memory is of the last one, which may have begun within the segment.
        """
        start = number * self._sizes.segment
        stop = min(start + self._sizes.segment, self._length)
        begin = start - self._sizes.sensory if number else start
        closing, numbers = prompt, None
        if self._documents is not None:
            first, last = self._document_of(start), self._document_of(stop - 1)
            closing = torch.where(first == last, prompt, self._weights.initial)
            numbers = torch.cat([first, self._documents[:, begin:stop], last], dim=1)
        output = self._between(prompt, slice(begin, stop), closing, numbers)
        return output[start - stop - 1 : -1], output[-1]

    def _summary(self, number: int) -> Tensor:
        """`[B, H]` what a segment asks with."""
        start = number * self._sizes.segment
        if self._sizes.mode == "strict_prev":
            span = slice(start - self._sizes.summary, start)
        else:
            span = slice(start, min(start + self._sizes.summary, self._length))
        numbers = None
        if self._documents is not None:
            own = self._document_of(start)
            numbers = torch.cat([own, self._documents[:, span], own], dim=1)
        assert self._weights.summary is not None
        asking = self._weights.summary.expand(self._rows, -1)
        return self._between(asking, span, asking, numbers)[-1]

    def _between(
        self, before: Tensor, span: slice, after: Tensor, documents: Tensor | None
    ) -> Tensor:
        """The trunk over a span of tokens between two embeddings `[B, H]`."""
        tokens = self._embedded[span.start - self._start : span.stop - self._start]
        hidden = torch.cat([before.unsqueeze(0), tokens, after.unsqueeze(0)])
        return self._reader.transform(hidden, documents)

    def _foreign(self, number: int, count: int) -> Tensor | None:
        """`[N, B]`, true for the memories of other documents than a segment begins with."""
        if self._documents is None:
            return None
        numbers = torch.arange(number - count, number, device=self._documents.device)
        owners = self._documents[:, (numbers + 1) * self._sizes.segment - 1]
        return (owners != self._document_of(number * self._sizes.segment)).t()

    def _document_of(self, position: int) -> Tensor:
        assert self._documents is not None
        return self._documents[:, position : position + 1]
