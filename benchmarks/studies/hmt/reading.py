"""What a model makes of long streams: losses by position, what it recalls, and how much it keeps.

Legend: B streams, S tokens, W tokens of a window, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.live_tensors import LiveTensorMeter
from model.inference.memory_stream import MemoryStream
from model.inference.network import Network
from model.inference.prefill import prefill
from model.language_model import MultiTokenModel
from model.memory.prompts import recall
from model.memory.unrolling import Window

_ROWS = 64  # windows that are read at once


@torch.no_grad()
def losses_with_memory(model: MultiTokenModel, tokens: Tensor) -> Tensor:
    """Of head 1 at each position of `[B, S]` but the last, `[B, S - 1]`; a stream is one text."""
    assert model.config.memory is not None
    segments = model(tokens[:, :-1]).split(model.config.memory.segment)
    logits = torch.cat([_logits(model, trunk_output) for trunk_output in segments])
    return _losses(logits, tokens)


@torch.no_grad()
def losses_without_memories(model: MultiTokenModel, tokens: Tensor) -> Tensor:
    """The same where each segment has the prompt of a stream that begins, and sensory tokens."""
    assert model.config.memory is not None
    segments = range(model.config.memory.num_segments(tokens.shape[1] - 1))
    logits = [
        _logits(model, model(tokens[:, :-1], window=Window(number, number, number + 1)))
        for number in segments
    ]
    return _losses(torch.cat(logits), tokens)


@torch.no_grad()
def losses_in_windows(model: MultiTokenModel, tokens: Tensor, window: int, stride: int) -> Tensor:
    """The same of a model without a memory, which sees W tokens at most and W - stride at least.

    Windows begin every `stride` tokens; a position counts in the first that it is in.

    Args:
        model: without a memory.
        tokens: `[B, S]`; S - 1 - W is a multiple of the stride.
        window: W.
        stride: of windows.
    """
    parts = tokens.unfold(1, window + 1, stride)  # [B, windows, W + 1]
    found = [
        _losses(_logits(model, model(rows[:, :-1])), rows)
        for rows in parts.flatten(0, 1).split(_ROWS)
    ]
    losses = torch.cat(found).unflatten(0, parts.shape[:2])
    return torch.cat([losses[:, 0], losses[:, 1:, -stride:].flatten(1)], dim=1)


def _logits(model: MultiTokenModel, trunk_output: Tensor) -> Tensor:
    """Of head 1, `[S, B, V]`."""
    return model.all_logits(trunk_output, model.heads_context(trunk_output))[0]


def _losses(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits.permute(1, 2, 0), tokens[:, 1:], reduction="none")


@torch.no_grad()
def recalls(model: MultiTokenModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Which memory each segment weighs most, from the third on; the second has no choice.

    Args:
        model: with retrieval, in mode strict_prev.
        tokens: `[B, S]`, whole segments.

    Returns:
        Numbers of the segments `[M - 2, B]` that are recalled, and their shares in the prompts.
    """
    sizes, weights = model.config.memory, model.memory()
    assert sizes is not None
    memories: list[Tensor] = []
    model(tokens, memories=memories)
    asking = weights.summary.expand(1, len(tokens), -1)
    found = []
    for start in range(2 * sizes.segment, tokens.shape[1], sizes.segment):
        before = model.embed(tokens[:, start - sizes.summary : start])
        summary = model.transform(torch.cat([asking, before, asking]), None)[-1]
        number = start // sizes.segment
        known = torch.stack(memories[:number][-sizes.cache :])
        share, place = recall(weights, summary, known).max(dim=0)
        found.append((place + number - len(known), share))
    numbers, shares = zip(*found, strict=True)
    return torch.stack(numbers), torch.stack(shares)


@torch.inference_mode()
def most_bytes(network: Network, tokens: list[int]) -> int:
    """Bytes of all tensors, weights among them, at most while a text is read to be gone on with."""
    with LiveTensorMeter() as meter:
        if network.config.memory is not None:
            MemoryStream(network).last(tokens)
        else:
            cache = network.new_cache(1, len(tokens) + 1)
            prefill(network, cache, torch.tensor([tokens]), torch.tensor([len(tokens)]), 1)
    return meter.peak
