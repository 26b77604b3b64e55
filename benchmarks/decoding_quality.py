"""What texts are worth by each way of decoding, and what they cost: of one model, the same prompts.

`python benchmarks/decoding_quality.py EXPORT [--draft EXPORT2]` continues prompts by every way in
`ways`, all in one process, on one thread of a CPU whose own time counts. *log p* is the mean
logarithm of the probability that head 1 gives a token of the text, *perplexity* its exponential,
*repeated* the share of a text's 4-grams that it has had before, *distinct* the share of its pairs
of tokens that are different. A high probability is no praise by itself: texts that repeat have one.
Forwards are those of all texts together. *Memory* is of all tensors at their peak, weights too.
*Right* is pass@1 of something else: the share of questions of benchmarks/studies/polynomials that
an export of that study, `--arithmetic`, answers right by these ways, its own heads drafting.
`--quick` takes few tokens, prints, and writes nothing.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__" and not __package__:
    # Run by path, Python puts this folder first; the packages are found from its parent.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from benchmarks.decoding import PROMPTS
from benchmarks.decoding_ways import DRAFTS, Task, Way, ways
from benchmarks.live_tensors import LiveTensorMeter
from benchmarks.studies.polynomials.problems import make_problem
from benchmarks.studies.polynomials.ring import SIZE
from benchmarks.tables import machine_line, replace_section
from model.inference.loading import LoadedNetwork, load_drafter, load_network

_OPERATIONS = 2  # of a question, at most; what the study trains


class Row(NamedTuple):
    """A row of the table; see the top of this file."""

    name: str
    kind: str
    log_p: float
    perplexity: float
    repeated: float
    distinct: float
    tokens: int
    tokens_per_s: float
    forwards: int
    draft_forwards: int
    memory_mib: float
    right: float | None


class Questions(NamedTuple):
    """What an export of the study of polynomials is asked.

    Attributes:
        task: its prompts.
        answers: the right texts.
        spelled: text of tokens.
    """

    task: Task
    answers: list[str]
    spelled: Callable[[list[int]], str]

    def right(self, way: Way) -> float:
        """The share that a way of decoding answers right at once."""
        given = map(self.spelled, way.run(self.task).tokens)
        return sum(a == b for a, b in zip(given, self.answers, strict=True)) / len(self.answers)


def measure(way: Way, task: Task, rounds: int, questions: Questions | None) -> Row:
    """The texts, which are the same in every round, and the fastest round's time."""
    with LiveTensorMeter() as meter:  # not timed: it looks at every operation
        way.run(task)
    seconds = math.inf
    for _ in range(rounds):
        start = time.process_time()
        texts = way.run(task)
        seconds = min(seconds, time.process_time() - start)
    logprobs = [logprob for text in texts.logprobs for logprob in text]
    log_p = sum(logprobs) / len(logprobs)
    count = len(logprobs)
    return Row(
        way.name,
        way.kind,
        log_p,
        math.exp(-log_p),
        sum(map(repeated, texts.tokens)) / len(texts.tokens),
        sum(map(distinct, texts.tokens)) / len(texts.tokens),
        count,
        count / seconds,
        texts.forwards,
        texts.draft_forwards,
        meter.peak / 2**20,
        questions.right(way) if questions is not None and "draft model" not in way.name else None,
    )


def repeated(tokens: Sequence[int], size: int = 4) -> float:
    """The share of a text's n-grams that it has had before."""
    grams = [tuple(tokens[at : at + size]) for at in range(len(tokens) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(tokens: Sequence[int], size: int = 2) -> float:
    """The share of a text's n-grams that are different."""
    return 1 - repeated(tokens, size)


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| decoding | class | log p | perplexity | repeated | distinct | tokens/s | forwards | of "
        "the draft model | memory, MiB | right |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.name} | {row.kind} | {row.log_p:.3f} | {row.perplexity:.2f} | {row.repeated:.2f} "
        f"| {row.distinct:.2f} | {row.tokens_per_s:,.0f} | {row.forwards} | {row.draft_forwards} "
        f"| {row.memory_mib:.1f} | {'-' if row.right is None else f'{row.right:.3f}'} |"
        for row in rows
    ]
    return "\n".join(lines)


def _task(
    export: Path, loaded: LoadedNetwork, draft: Path | None, new_tokens: int, texts: int
) -> Task:
    prompts = [loaded.tokenizer.encode(PROMPTS[n % len(PROMPTS)]).ids for n in range(texts)]
    drafter = None if draft is None else load_drafter(draft, loaded)
    return Task(export, loaded.network, drafter, prompts, loaded.eos_ids, new_tokens)


def _questions(export: Path, count: int) -> Questions:
    """The same ones each time, of one and two operations."""
    loaded, generator = load_network(export), random.Random(1_000)
    problems = [make_problem(generator, 1 + n % _OPERATIONS) for n in range(count)]
    prompts = [loaded.tokenizer.encode(problem.question).ids for problem in problems]
    task = Task(export, loaded.network, None, prompts, loaded.eos_ids, SIZE)
    return Questions(task, [problem.answer for problem in problems], loaded.tokenizer.decode)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, prog="decoding_quality.py")
    parser.add_argument("export", type=Path)
    parser.add_argument("--draft", type=Path, metavar="EXPORT2", help="a smaller model (none)")
    parser.add_argument(
        "--arithmetic", type=Path, metavar="EXPORT3", help="of the study of polynomials (none)"
    )
    parser.add_argument("--questions", type=int, default=400, help="that it is asked")
    parser.add_argument("--output", type=Path, help="where README.md and results/ are (nowhere)")
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each text")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="few tokens; prints, writes nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.quick:
        options.texts, options.tokens, options.rounds, options.output = 2, 6, 1, None
        options.questions = 4
    loaded = load_network(options.export)
    task = _task(options.export, loaded, options.draft, options.tokens, options.texts)
    questions = None
    if options.arithmetic is not None:
        questions = _questions(options.arithmetic, options.questions)
    rows = []
    vocab_size = loaded.network.config.vocab_size
    for way in ways(drafter=task.drafter is not None, vocab_size=vocab_size):
        rows.append(measure(way, task, options.rounds, questions))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))
    if options.output is None:
        return
    description = loaded.record.description
    machine = machine_line("cpu", ("torch",))
    size = description.model.num_parameters() / 1e6
    drafter = task.drafter.config.num_parameters() / 1e6 if task.drafter is not None else None
    intro = (
        f"{machine} {description.run}: {size:.1f} M parameters, step {description.step}"
        + ("" if drafter is None else f"; the draft model has {drafter:.2f} M")
        + f". {options.texts} texts of at most {options.tokens} new tokens, {DRAFTS} drafts, "
        f"by heads {task.heads - 1}."
    )
    if questions is not None:
        intro += f" Right: of {options.questions} questions."
    small = "" if description.run == "bytes" else f"{description.run} "
    name = f"decoding_quality {small}cpu"
    replace_section(options.output / "README.md", name, f"{intro}\n\n{table(rows)}")
    raw = options.output / "results" / f"{name.replace(' ', '-')}.json"
    content = {"machine": machine, "results": [row._asdict() for row in rows]}
    raw.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
