"""Loss and bits per byte of every head on held-out text, and how far the heads agree.

A stream is read in windows of W tokens that begin every `stride` tokens. Head k has a target at
position t if the stream has a token t + k, in the window or behind it, and each target counts once:
in the first window, all of them; in a later one those of the positions that no window before had,
which with a stride below W have at least W - stride tokens before them. Nothing is left out at the
end of a stream. With a stride of W, the default, windows are the sequences that training validates
on.

    W = 4, stride 2     stream   a b c d e f g h
    window 1            a b c d                   counts positions a b c d
    window 2                c d e f               counts e f
    window 3                    e f g h           counts g (h is followed by nothing)

A model with a memory remembers within a window, whose length it does not limit: one of the stream's
length is the stream read at once, in constant memory.

Bits per byte of head k are its losses in bits, summed over its targets, divided by the bytes that
the text of these targets has. The token that ends a document is a target, whose bits count, and
spells no byte. The first k tokens of a stream are no targets of head k: their bytes do not count.

Legend: B rows, S tokens of the longest window of a batch, n heads, N = B * S, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from model.hugging_face.token_bytes import bytes_of_tokens
from model.inference.cache import Block, Cache
from model.inference.memory_stream import MemoryStream
from model.inference.network import Network
from model.operations.agreement import agreement_counts
from pipeline.evaluating.model_folder import EvaluatedModel
from pipeline.evaluating.texts import Marks, Stream, TextKind

IGNORED = -100
_NO_PREDICTION = -1
# Tokens of a batch, and elements of the logits that exist at once.
_BATCH_TOKENS = 8192
_LOGIT_ELEMENTS = 1 << 23


class Windows(NamedTuple):
    """How streams are read.

    Attributes:
        size: W.
        stride: tokens from the beginning of a window to that of the next, at most W.
        max_positions: of each kind of text, from its first; None = all.
    """

    size: int
    stride: int
    max_positions: int | None = None


class HeldOut(NamedTuple):
    """Figures of a kind of text, or of all.

    Attributes:
        documents: how many.
        tokens: targets of each head.
        text_bytes: that the targets of each head spell.
        losses: mean loss of each head, nats per token; NaN without a target.
        bits_per_byte: of each head; NaN where its targets spell nothing.
        tokens_per_forward: expected with heads 1 .. k in use, for each k: 1 + the sum over j from
            2 to k of the share of positions where heads 2 .. j all agree with head 1.
    """

    documents: int
    tokens: list[int]
    text_bytes: list[int]
    losses: list[float]
    bits_per_byte: list[float]
    tokens_per_forward: list[float]


class _Window(NamedTuple):
    """A window of a stream.

    Attributes:
        tokens: of the window, and up to n behind it.
        marks: of these tokens, if only some are targets.
        length: tokens that are read.
        first: the first position that counts.
        ends: whether the stream ends with it.
    """

    tokens: Stream
    marks: Marks | None
    length: int
    first: int
    ends: bool


class _Sums(NamedTuple):
    """Sums over targets, `[n]` each in float64, and the positions where heads 1 .. k agree."""

    losses: NDArray[np.float64]
    tokens: NDArray[np.float64]
    text_bytes: NDArray[np.float64]
    agreed: NDArray[np.float64]

    def plus(self, other: "_Sums") -> "_Sums":
        return _Sums(*(a + b for a, b in zip(self, other, strict=True)))


def measure(
    model: EvaluatedModel, kinds: Sequence[TextKind], windows: Windows
) -> tuple[dict[str, HeldOut], HeldOut]:
    """Figures of each kind of text, and of all of them, each target weighing the same.

    Args:
        model: the model.
        kinds: the texts.
        windows: how they are read.
    """
    network = model.network
    sizes = bytes_of_tokens(model.tokenizer, network.config.vocab_size)
    reader = _Reader(network, torch.tensor(sizes, device=network.device))
    none = np.zeros(network.num_heads)
    total, by_kind = _Sums(none, none, none, none), {}
    for kind in kinds:
        sums = _Sums(none, none, none, none)
        found = _windows_of(kind, windows, network.num_heads)
        if network.config.memory is None:
            for batch in _batches(found):
                sums = sums.plus(reader.read(batch))
        else:
            for window in found:
                sums = sums.plus(reader.remember(window))
        by_kind[kind.name] = _figures(kind.documents, sums)
        total = total.plus(sums)
    return by_kind, _figures(sum(kind.documents for kind in kinds), total)


def _figures(documents: int, sums: _Sums) -> HeldOut:
    per_token = sums.losses / np.where(sums.tokens > 0, sums.tokens, math.nan)
    per_byte = sums.losses / np.where(sums.text_bytes > 0, sums.text_bytes, math.nan) / math.log(2)
    shares = sums.agreed / max(sums.agreed[0], 1.0)
    return HeldOut(
        documents=documents,
        tokens=sums.tokens.astype(int).tolist(),
        text_bytes=sums.text_bytes.astype(int).tolist(),
        losses=per_token.tolist(),
        bits_per_byte=per_byte.tolist(),
        tokens_per_forward=(1.0 + np.cumsum(shares) - shares[0]).tolist(),
    )


def _windows_of(kind: TextKind, windows: Windows, heads: int) -> Iterator[_Window]:
    """The windows of a kind's streams."""
    left = math.inf if windows.max_positions is None else windows.max_positions
    for number, stream in enumerate(kind.streams):
        marks = None if kind.marks is None else kind.marks[number]
        targeted = len(stream) - 1  # positions that a token follows
        positions = int(min(targeted, left))
        left -= positions
        done = 0
        for start in range(0, positions, windows.stride):
            end = min(start + windows.size, positions)
            yield _Window(
                tokens=stream[start : end + heads],
                marks=None if marks is None else marks.part(start, end + heads),
                length=end - start,
                first=done - start,
                ends=end == targeted,
            )
            done = end
            if end == positions:
                break


def _batches(windows: Iterator[_Window]) -> Iterator[list[_Window]]:
    """Windows of about the same length together, so that little is padding."""
    ordered = sorted(windows, key=lambda window: window.length)
    batch: list[_Window] = []
    for window in ordered:
        if batch and (len(batch) + 1) * window.length > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


class _Reader:
    """Runs a model over windows.

    Args:
        network: the model.
        token_bytes: `[V]` bytes that each token spells.
    """

    def __init__(self, network: Network, token_bytes: Tensor) -> None:
        self._network = network
        self._token_bytes = token_bytes
        self._chunk = max(_LOGIT_ELEMENTS // network.config.vocab_size, 16)

    @torch.inference_mode()
    def read(self, batch: Sequence[_Window]) -> _Sums:
        """Sums over the targets of some windows."""
        network = self._network
        heads, length = network.num_heads, max(window.length for window in batch)
        tokens, targets, comparable = _tensors(batch, length, heads, network.device)
        cache, block = self._places(len(batch), length)
        trunk_output = network.trunk(tokens, cache, block)
        trunk_output = network.fill_heads(trunk_output, heads, cache, block)
        losses, predictions = self._nothing(len(batch), length)
        for head in range(1, heads + 1):
            wanted = targets[head - 1]
            chosen = wanted.flatten().ne(IGNORED).nonzero().squeeze(1)
            hidden = network.heads(trunk_output, head, head, cache, block)[0, chosen]
            loss, best = self._losses(head, hidden, wanted.flatten()[chosen])
            losses[head - 1] = loss
            found = predictions[head - 1, :, :length].clone().flatten()
            found[chosen] = best
            predictions[head - 1, :, :length] = found.view(len(batch), length)
        return self._sums(losses, targets, predictions, comparable)

    @torch.inference_mode()
    def remember(self, window: _Window) -> _Sums:
        """Sums over the targets of a window, of a model with a memory."""
        network, length = self._network, window.length
        heads = network.num_heads
        _, targets, comparable = _tensors([window], length, heads, network.device)
        losses, predictions = self._nothing(1, length)
        start, tokens = 0, window.tokens[:length].tolist()
        for outputs in MemoryStream(network, heads=heads).outputs(tokens):
            stop = start + outputs.shape[1]
            for head, (hidden, wanted) in enumerate(
                zip(outputs, targets[:, 0, start:stop], strict=True), 1
            ):
                chosen = wanted.ne(IGNORED).nonzero().squeeze(1)
                loss, best = self._losses(head, hidden[chosen], wanted[chosen])
                losses[head - 1] += loss
                predictions[head - 1, 0, start + chosen] = best
            start = stop
        return self._sums(losses, targets, predictions, comparable)

    def _nothing(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Losses `[n]` and predictions `[n, B, S + n - 1]` before any head has run."""
        heads, device = self._network.num_heads, self._network.device
        # Positions past the window's end have no prediction, so none agrees with them.
        shape = (heads, rows, length + heads - 1)
        losses = torch.zeros(heads, dtype=torch.float64, device=device)
        return losses, torch.full(shape, _NO_PREDICTION, device=device)

    def _places(self, rows: int, length: int) -> tuple[Cache, Block]:
        """A cache for windows, and the block of all their positions."""
        network = self._network
        cache = network.new_cache(rows, length)
        positions = torch.arange(length, device=network.device).expand(rows, -1)
        return cache, network.block(cache, positions, positions, None, length)

    def _losses(self, head: int, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the losses in float64, and the likeliest tokens.

        Args:
            head: its number.
            hidden: `[T, H]` of the head.
            targets: `[T]`.
        """
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        best = [targets.new_empty(0)]
        for start in range(0, len(hidden), self._chunk):
            part = slice(start, start + self._chunk)
            logits = self._network.head_logits(hidden[part].unsqueeze(0), head)[0]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            total += F.cross_entropy(logits, targets[part], reduction="sum")
            best.append(logits.argmax(dim=-1))
        return total, torch.cat(best)

    def _sums(
        self, losses: Tensor, targets: Tensor, predictions: Tensor, comparable: Tensor
    ) -> _Sums:
        """Bring the sums of a batch to the host.

        Args:
            losses: `[n]`.
            targets: `[n, B, S]`.
            predictions: `[n, B, S + n - 1]`.
            comparable: `[B, S]` positions that agreement is counted at.
        """
        valid = F.pad(targets != IGNORED, (0, len(targets) - 1))
        valid[0, :, : targets.shape[2]] &= comparable
        spelled = self._token_bytes[targets.clamp(min=0)].masked_fill(targets == IGNORED, 0)
        agreed = agreement_counts(predictions.transpose(1, 2), valid.transpose(1, 2))
        columns = (losses, (targets != IGNORED).sum((1, 2)), spelled.sum((1, 2)), agreed)
        return _Sums(*(column.double().cpu().numpy() for column in columns))


def _tensors(
    batch: Sequence[_Window], length: int, heads: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs `[B, S]`, targets `[n, B, S]`, and positions `[B, S]` that agreement is counted at.

    Agreement at t needs what head 1 predicts up to t + n - 1: in the window, unless the stream
    ends, after which nothing agrees.
    """
    tokens = np.zeros((len(batch), length), np.int64)
    targets = np.full((heads, len(batch), length), IGNORED, np.int64)
    comparable = np.zeros((len(batch), length), bool)
    for row, window in enumerate(batch):
        tokens[row, : window.length] = window.tokens[: window.length]
        for head in range(1, heads + 1):
            ahead = window.tokens[window.first + head : window.length + head]
            found = targets[head - 1, row, window.first : window.first + len(ahead)]
            found[:] = ahead
            if window.marks is not None:
                found[~window.marks.allow(window.first, head, len(ahead))] = IGNORED
        last = window.length if window.ends else window.length - heads + 1
        comparable[row, window.first : max(last, 0)] = True
    arrays = (tokens, targets, comparable)
    inputs, labels, compared = (torch.from_numpy(array).to(device) for array in arrays)
    return inputs, labels, compared
