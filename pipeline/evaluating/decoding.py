"""Tokens per forward of real self-speculative decoding, on prompts out of the text."""

import time
from collections.abc import Sequence
from typing import NamedTuple

from model.decoding.generation import generate
from pipeline.evaluating.model_folder import EvaluatedModel
from pipeline.evaluating.texts import Stream, TextKind


class Prompting(NamedTuple):
    """What is decoded.

    Attributes:
        prompts: of each kind of text.
        prompt_tokens: of each.
        new_tokens: at most, after each.
    """

    prompts: int
    prompt_tokens: int
    new_tokens: int


class Decoded(NamedTuple):
    """What greedy decoding with all heads took.

    Attributes:
        prompts: how many there were.
        tokens: new ones, after all prompts.
        tokens_per_forward: mean tokens that a forward after the prompt's gave a text.
        tokens_per_s: new tokens of all prompts per second, reading the prompts included.
    """

    prompts: int
    tokens: int
    tokens_per_forward: float
    tokens_per_s: float


def decode(
    model: EvaluatedModel, kinds: Sequence[TextKind], prompting: Prompting
) -> dict[str, Decoded]:
    """Decode from prompts of each kind of text, as one batch; kinds too short for one are left out.

    Args:
        model: the model.
        kinds: the texts.
        prompting: which prompts.
    """
    found = {}
    for kind in kinds:
        prompts = choose_prompts(kind.streams, prompting)
        if not prompts:
            continue
        start = time.perf_counter()
        result = generate(
            model.network,
            prompts,
            heads=model.network.num_heads,
            max_new_tokens=prompting.new_tokens,
            eos_id=model.end,
        )
        seconds = time.perf_counter() - start
        found[kind.name] = Decoded(
            prompts=len(prompts),
            tokens=result.num_tokens,
            tokens_per_forward=result.tokens_per_forward,
            tokens_per_s=result.num_tokens / seconds,
        )
    return found


def choose_prompts(streams: Sequence[Stream], prompting: Prompting) -> list[list[int]]:
    """Pieces of the streams, spread evenly over them; the same ones each time.

    Args:
        streams: tokens.
        prompting: how many pieces, and how long they are.
    """
    size = prompting.prompt_tokens
    starts = [
        (number, start)
        for number, stream in enumerate(streams)
        for start in range(0, len(stream) - size + 1, size)
    ]
    count = min(prompting.prompts, len(starts))
    chosen = [starts[index * len(starts) // count] for index in range(count)]
    return [streams[number][start : start + size].tolist() for number, start in chosen]
