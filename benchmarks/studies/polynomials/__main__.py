"""Study: does predicting further tokens help a model to calculate?

`python -m benchmarks.studies.polynomials [--quick]` trains every point of grid.yaml on problems of
1 and 2 operations and asks each 2,000 questions of 1 to 4, greedily.
"""

import json
import random
import sys
from pathlib import Path

import torch

from benchmarks.studies.polynomials.problems import Problem, make_problem
from benchmarks.studies.polynomials.ring import SIZE
from benchmarks.studies.runner import Figures, Study, Trained, main, shard
from model.decoding.generation import generate
from model.inference.loading import limit_threads, load_network

PAUSES = {"no_pauses": 0, "five_pauses": 5}
TRAINED_UP_TO, ASKED_UP_TO = 2, 4
_PROBLEMS, _QUICK_PROBLEMS = 400_000, 4_000
_QUESTIONS, _QUICK_QUESTIONS = 2_000, 40
_ROWS = 250


def prepare(folder: Path, quick: bool) -> dict[str, Path]:
    """Shards of problems, without pause tokens and with; the number of operations is uniform.

    The loss is on the answers alone: digits of questions cannot be foretold.
    """
    return {name: _sharded(folder / name, pauses, quick) for name, pauses in PAUSES.items()}


def _sharded(folder: Path, pauses: int, quick: bool) -> Path:
    path = folder.with_suffix(".jsonl")
    if not (folder / "manifest.json").exists():
        generator = random.Random(11)
        with path.open("w") as file:
            for _ in range(_QUICK_PROBLEMS if quick else _PROBLEMS):
                operations = generator.randint(1, TRAINED_UP_TO)
                problem = make_problem(generator, operations, pauses)
                file.write(json.dumps(problem._asdict()) + "\n")
    keys = ("--prompt-key", "question", "--completion-key", "answer")
    return shard(folder, "--input", str(path), "--tokenizer", "bytes", *keys)


def questions(operations: int, count: int, pauses: int) -> list[Problem]:
    """The same ones for every point, but for the pauses."""
    generator = random.Random(1_000 + operations)
    return [make_problem(generator, operations, pauses) for _ in range(count)]


def measure(trained: Trained, quick: bool) -> Figures:
    """Share of right answers by the number of operations, and the losses that were reached."""
    loaded = load_network(trained.export, torch.float32)
    limit_threads(loaded.network)
    pauses = PAUSES[trained.settings["data.shards"]]
    figures: Figures = {}
    for operations in range(1, ASKED_UP_TO + 1):
        asked = questions(operations, _QUICK_QUESTIONS if quick else _QUESTIONS, pauses)
        right = digits = 0
        for start in range(0, len(asked), _ROWS):
            part = asked[start : start + _ROWS]
            prompts = [loaded.tokenizer.encode(problem.question).ids for problem in part]
            found = generate(loaded.network, prompts, heads=1, max_new_tokens=SIZE)
            for tokens, problem in zip(found.tokens, part, strict=True):
                answer = loaded.tokenizer.decode(tokens)
                right += answer == problem.answer
                digits += sum(a == b for a, b in zip(answer, problem.answer, strict=False))
        figures[f"right_{operations}"] = right / len(asked)
        figures[f"digits_{operations}"] = digits / (SIZE * len(asked))
    return figures | {"loss": trained.held_out_loss}


STUDY = Study(
    folder=Path(__file__).parent,
    title="Arithmetic of polynomials in F_7[X]/(X^5)",
    prepare=prepare,
    measure=measure,
    columns={
        **{
            f"{what}_{m}": f"{what}, m = {m}" + (" (not trained)" if m > TRAINED_UP_TO else "")
            for what in ("right", "digits")
            for m in range(1, ASKED_UP_TO + 1)
        },
        "loss": "held-out loss on answers, head 1",
    },
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
