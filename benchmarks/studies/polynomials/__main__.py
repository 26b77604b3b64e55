"""Study: does predicting further tokens help a model to calculate?

`python -m benchmarks.studies.polynomials [--quick]` trains every point of grid.yaml on problems of
1 to 5 operations and asks each 2,000 questions of 1 to 7, greedily.
"""

import json
import random
import sys
from pathlib import Path

import torch

from benchmarks.studies.polynomials.problems import Problem, make_problem
from benchmarks.studies.runner import Figures, Study, Trained, main, shard
from model.decoding.generation import generate
from model.inference.loading import limit_threads, load_network

TRAINED_UP_TO, ASKED_UP_TO = 5, 7
_PROBLEMS, _QUICK_PROBLEMS = 400_000, 4_000
_QUESTIONS, _QUICK_QUESTIONS = 2_000, 40
_ROWS = 250


def prepare(folder: Path, quick: bool) -> dict[str, Path]:
    """Shards of problems, one a document; the number of operations is uniform."""
    path = folder / "problems.jsonl"
    if not (folder / "shards" / "manifest.json").exists():
        generator = random.Random(11)
        with path.open("w") as file:
            for _ in range(_QUICK_PROBLEMS if quick else _PROBLEMS):
                problem = make_problem(generator, generator.randint(1, TRAINED_UP_TO))
                file.write(json.dumps({"text": problem.question + problem.answer}) + "\n")
    set_folder = folder / "shards"
    return {"problems": shard(set_folder, "--input", str(path), "--tokenizer", "bytes")}


def questions(operations: int, count: int) -> list[Problem]:
    """The same ones for every point."""
    generator = random.Random(1_000 + operations)
    return [make_problem(generator, operations) for _ in range(count)]


def measure(trained: Trained, quick: bool) -> Figures:
    """Share of right answers by the number of operations, and the losses that were reached."""
    loaded = load_network(trained.export, torch.float32)
    limit_threads(loaded.network)
    figures: Figures = {}
    for operations in range(1, ASKED_UP_TO + 1):
        asked = questions(operations, _QUICK_QUESTIONS if quick else _QUESTIONS)
        right = 0
        for start in range(0, len(asked), _ROWS):
            part = asked[start : start + _ROWS]
            prompts = [loaded.tokenizer.encode(problem.question).ids for problem in part]
            found = generate(loaded.network, prompts, heads=1, max_new_tokens=5)
            answers = [loaded.tokenizer.decode(tokens) for tokens in found.tokens]
            right += sum(a == p.answer for a, p in zip(answers, part, strict=True))
        figures[f"right_{operations}"] = right / len(asked)
    return figures | {"loss": trained.held_out_loss}


STUDY = Study(
    folder=Path(__file__).parent,
    title="Arithmetic of polynomials in F_7[X]/(X^5)",
    prepare=prepare,
    measure=measure,
    columns={
        **{
            f"right_{m}": f"m = {m}" + (" (not trained)" if m > TRAINED_UP_TO else "")
            for m in range(1, ASKED_UP_TO + 1)
        },
        "loss": "held-out loss, head 1",
    },
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
