"""Study: does a model of several heads learn a new task better, and with how many heads?

`python -m benchmarks.studies.finetuning [--quick]` pretrains models with one and with four heads on
texts about words, finetunes each on prompts and completions, with one head and with four, and asks
for completions of words that no model saw.
"""

import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks.studies.finetuning.words import LENGTH, make_question, make_text
from benchmarks.studies.runner import Figures, Study, Trained, main, shard
from model.decoding.generation import generate
from model.decoding.sampling import Sampling
from model.inference.loading import LoadedNetwork, limit_threads, load_network

_TEXTS, _QUESTIONS, _QUICK_PART = 20_000, 60_000, 40
_ASKED, _QUICK_ASKED = 500, 20
_SAMPLES, _TEMPERATURE = 10, 0.8


def prepare(folder: Path, quick: bool) -> dict[str, Path]:
    """Shards of texts, and of prompts and completions; both in bytes."""
    generator, part = random.Random(31), _QUICK_PART if quick else 1
    texts = ({"text": make_text(generator)} for _ in range(_TEXTS // part))
    questions = (make_question(generator, asked=False)._asdict() for _ in range(_QUESTIONS // part))
    keys = ("--prompt-key", "prompt", "--completion-key", "answer")
    return {
        "texts": _sharded(folder / "texts", texts),
        "questions": _sharded(folder / "questions", questions, *keys),
    }


def _sharded(folder: Path, records: Iterable[dict[str, str]], *arguments: str) -> Path:
    path = folder.with_suffix(".jsonl")
    if not path.exists():
        unfinished = folder.with_suffix(".tmp")
        with unfinished.open("w") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        unfinished.rename(path)
    return shard(folder, "--input", str(path), "--tokenizer", "bytes", *arguments)


def measure(trained: Trained, quick: bool) -> Figures:
    """Share of completions that are right: greedily, and any of some samples; of head 1 alone."""
    loaded = load_network(trained.export, torch.float32)
    limit_threads(loaded.network)
    generator = random.Random(37)
    asked = [make_question(generator, asked=True) for _ in range(_QUICK_ASKED if quick else _ASKED)]
    prompts = [question.prompt for question in asked]
    greedy = _completions(loaded, prompts, Sampling(), 0)
    sampling = Sampling(temperature=_TEMPERATURE)
    samples = [_completions(loaded, prompts, sampling, seed) for seed in range(_SAMPLES)]
    right, letters, any_right = 0, 0, 0
    for place, question in enumerate(asked):
        right += greedy[place] == question.answer
        letters += sum(a == b for a, b in zip(greedy[place], question.answer, strict=False))
        any_right += any(sample[place] == question.answer for sample in samples)
    return {
        "right": right / len(asked),
        "any_right": any_right / len(asked),
        "letters": letters / (len(asked) * LENGTH),
        "loss": trained.held_out_loss,
    }


def _completions(
    loaded: LoadedNetwork, prompts: list[str], sampling: Sampling, seed: int
) -> list[str]:
    """One for each prompt."""
    ids = [loaded.tokenizer.encode(prompt).ids for prompt in prompts]
    seeds = [seed * len(ids) + row for row in range(len(ids))]
    found = generate(
        loaded.network, ids, heads=1, max_new_tokens=LENGTH, sampling=sampling, seeds=seeds
    )
    return [loaded.tokenizer.decode(tokens) for tokens in found.tokens]


STUDY = Study(
    folder=Path(__file__).parent,
    title="Finetuning from n heads to n'",
    prepare=prepare,
    measure=measure,
    columns={
        "right": "right (pass@1, greedy)",
        "any_right": f"any of {_SAMPLES} samples right (pass@{_SAMPLES})",
        "letters": "letters right",
        "loss": "held-out loss on completions, head 1",
    },
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
