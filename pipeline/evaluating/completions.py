"""Completions of a problem: sampled, and cut where they leave the function."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from model.decoding.generation import Generation, collect, generate
from model.decoding.sampling import Sampling
from model.decoding.stopping import StopStrings
from model.streaming.generation import continued
from pipeline.evaluating.model_folder import EvaluatedModel
from pipeline.evaluating.problems import Problem

_ROWS = 64  # completions that are decoded at once


class Drawing(NamedTuple):
    """How completions are drawn.

    Attributes:
        samples: of each problem.
        heads: that draft; the distribution does not depend on it. A model with a memory has none.
        sampling: temperature and filters.
        max_new_tokens: of each, at most.
        seed: of all.
    """

    samples: int
    heads: int
    sampling: Sampling
    max_new_tokens: int
    seed: int


def draw(model: EvaluatedModel, problem: Problem, drawing: Drawing) -> Iterator[str]:
    """The completions of a problem; none when its prompt leaves no room.

    Args:
        model: the model.
        problem: the problem.
        drawing: how.
    """
    begin = [] if model.begin is None else [model.begin]
    ids = model.tokenizer.encode(problem.prompt, add_special_tokens=False).ids
    prompt = begin + ids
    room = drawing.max_new_tokens
    if model.network.config.memory is None:
        room = min(room, model.positions - len(prompt))
    if room < 1:
        return
    stop = StopStrings(model.tokenizer, problem.stops)
    given = model.tokenizer.decode(ids, skip_special_tokens=True)
    for first in range(0, drawing.samples, _ROWS):
        numbers = range(first, min(first + _ROWS, drawing.samples))
        seeds = [seed_of(drawing.seed, problem.task_id, number) for number in numbers]
        result = _continue(model, prompt, room, drawing, seeds, stop)
        for tokens in result.tokens:
            new = [token for token in tokens if token != model.end]
            # Decoded together, so that pieces of one character meet.
            whole = model.tokenizer.decode(ids + new, skip_special_tokens=True)
            yield stop.cut(whole.removeprefix(given))


def _continue(
    model: EvaluatedModel,
    prompt: Sequence[int],
    room: int,
    drawing: Drawing,
    seeds: Sequence[int],
    stop: StopStrings,
) -> Generation:
    """Continue a prompt once for each seed, by so many tokens at most."""
    prompts = [prompt] * len(seeds)
    if model.network.config.memory is None:
        return generate(
            model.network,
            prompts,
            heads=drawing.heads,
            max_new_tokens=room,
            eos_id=model.end,
            sampling=drawing.sampling,
            seeds=seeds,
            stop=stop,
        )
    pieces = continued(
        model.network,
        prompts,
        max_new_tokens=room,
        eos_id=[] if model.end is None else [model.end],
        stop=stop,
        sampling=drawing.sampling,
        seeds=seeds,
    )
    return collect(pieces, len(prompts))


def seed_of(seed: int, task_id: str, number: int) -> int:
    """The seed of one completion, which no other problem, order or batch changes."""
    digest = hashlib.sha256(f"{seed} {number} {task_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
