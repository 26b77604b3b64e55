"""What texts are worth by each way of decoding, and what they cost: of one model, the same prompts.

`python benchmarks/decoding_quality.py EXPORT [--draft EXPORT2]` continues prompts by every way in
`ways`, all in one process, on one thread of a CPU whose own time counts. *log p* is the mean
logarithm of the probability that head 1 gives a token of the text, *perplexity* its exponential,
*repeated* the share of a text's 4-grams that it has had before, *distinct* the share of its pairs
of tokens that are different. A high probability is no praise by itself: texts that repeat have one.
Forwards are those of all texts together. *Memory* is what a way adds at its peak to a process.
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
from benchmarks.grown_memory import grown_mib
from benchmarks.studies.polynomials.problems import make_problem
from benchmarks.studies.polynomials.ring import SIZE
from benchmarks.tables import machine_line, replace_section
from model.beams.hypotheses import Beam, BeamSettings
from model.beams.search import beam_search
from model.beams.speculative import speculative_beams
from model.beams.speculative_text import Speculation
from model.decoding.chain import ChainDecoder
from model.decoding.draft_model import DraftModelDecoder
from model.decoding.generation import collect, stream
from model.decoding.sampling import GREEDY, Sampling
from model.inference.loading import LoadedNetwork, load_drafter, load_network
from model.inference.network import Network
from model.joint_decoding.decoder import JointDecoder
from model.joint_decoding.draft_model import JointModelDecoder
from model.joint_decoding.enumeration import ExactJointDecoder
from model.joint_decoding.rule import JointRule

SAMPLED = Sampling(temperature=1.0)
DRAFTS = 3
_OPERATIONS = 2  # of a question, at most; what the study trains


class Texts(NamedTuple):
    """What a way of decoding gave.

    Attributes:
        tokens: new ones of each text.
        logprobs: of each, by head 1.
        forwards: of the model.
        draft_forwards: of a second one.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    forwards: int
    draft_forwards: int


class Task(NamedTuple):
    """What every way has to do.

    Attributes:
        network: the model.
        drafter: a second one.
        prompts: token ids.
        eos_ids: tokens that end a text.
        new_tokens: of each text, at most.
    """

    network: Network
    drafter: Network | None
    prompts: list[list[int]]
    eos_ids: frozenset[int]
    new_tokens: int

    @property
    def heads(self) -> int:
        """How many of the model's are used, where they draft."""
        return min(DRAFTS + 1, self.network.num_heads)

    def beams(self, width: int, sampling: Sampling, *, distinct: bool = False) -> BeamSettings:
        """Of so many beams."""
        return BeamSettings(width, self.new_tokens, sampling, distinct, eos_ids=self.eos_ids)


class Way(NamedTuple):
    """A way of decoding: its name, its class, and what it does."""

    name: str
    kind: str
    run: Callable[[Task], Texts]


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


def ways(*, drafter: bool) -> list[Way]:
    """All of them; with a second model also those that it drafts for."""
    found = [
        Way("greedy", "greedy-exact", lambda task: _chain(task, 1, GREEDY)),
        Way("self-speculation", "greedy-exact", lambda task: _chain(task, None, GREEDY)),
        Way("sampling", "exact", lambda task: _chain(task, 1, SAMPLED)),
        Way("speculative sampling, heads", "exact", lambda task: _chain(task, None, SAMPLED)),
        *(_searched(width) for width in (2, 4)),
        *(_drawn(width, distinct) for distinct in (False, True) for width in (2, 4)),
        *(_drafted(width, t, "heads") for width in (2, 4) for t in (0.5, 0.9)),
        *(_drafted(width, 1, "heads", least=width) for width in (2, 4)),
        Way("likeliest blocks of 2", "MJGD", _blocks),
        *_every_joint("heads"),
    ]
    if drafter:
        found += [
            Way("speculative sampling, draft model", "exact", _draft_model),
            *(_drafted(width, t, "draft model") for width in (2, 4) for t in (0.5, 0.9)),
            *(_drafted(width, 1, "draft model", least=width) for width in (2, 4)),
            _drafted(4, 0.9, "draft model", one_beam=True),
            *_every_joint("draft model"),
        ]
    return found


def _searched(width: int) -> Way:
    return Way(
        f"beam search, W {width}",
        "beam search",
        lambda task: _of_beams(task, width, GREEDY, distinct=False),
    )


def _drawn(width: int, distinct: bool) -> Way:
    name = "distinct beam sampling" if distinct else "beam sampling"
    return Way(
        f"{name}, W {width}",
        "p_beam",
        lambda task: _of_beams(task, width, SAMPLED, distinct=distinct),
    )


def _of_beams(task: Task, width: int, sampling: Sampling, *, distinct: bool) -> Texts:
    settings = task.beams(width, sampling, distinct=distinct)
    found = beam_search(task.network, task.prompts, settings)
    return Texts(found.tokens, _logprobs(found.ranked), found.forwards, 0)


def _drafted(
    width: int, threshold: float, by: str, *, least: int = 1, one_beam: bool = False
) -> Way:
    def run(task: Task) -> Texts:
        drafter = task.drafter if by == "draft model" else None
        drafts = task.heads - 1 if drafter is None else DRAFTS
        speculation = Speculation(drafts, threshold, least, one_beam)
        found = speculative_beams(
            task.network, task.prompts, task.beams(width, SAMPLED), speculation, drafter=drafter
        )
        return Texts(found.tokens, _logprobs(found.ranked), found.forwards, found.draft_forwards)

    wide = f"t {threshold:g}" if least < width else "all layers"
    name = f"DSBD, W {width}, {wide}, {by}" + (", one beam" if one_beam else "")
    return Way(name, "lossy" if one_beam else "p_beam", run)


def _every_joint(by: str) -> list[Way]:
    greedy = [_joint(JointRule(threshold=tau), by) for tau in (0.1, 0.5, 0.9)]
    several = _joint(JointRule(candidates=4), by)
    return [*greedy, several, _joint(JointRule(), by, SAMPLED)]


def _joint(rule: JointRule, by: str, sampling: Sampling = GREEDY) -> Way:
    def run(task: Task) -> Texts:
        return _drafted_jointly(task, rule, by, sampling)

    name = f"{'MTAD' if rule.candidates == 1 else 'MMTAD'}, tau {rule.threshold:g}, {by}"
    return Way(name if sampling.greedy else f"{name}, drawn", "lossy", run)


def _drafted_jointly(task: Task, rule: JointRule, by: str, sampling: Sampling) -> Texts:
    network, drafter, eos_ids = task.network, task.drafter, task.eos_ids
    if by == "draft model" and drafter is not None:
        decoder: JointDecoder = JointModelDecoder(
            network,
            drafter=drafter,
            drafts=DRAFTS,
            rule=rule,
            eos_id=eos_ids,
            sampling=sampling,
            logprobs=True,
        )
    else:
        decoder = JointDecoder(
            network,
            heads=task.heads,
            rule=rule,
            eos_id=eos_ids,
            sampling=sampling,
            logprobs=True,
        )
    texts = _streamed(task, decoder)
    return texts._replace(draft_forwards=decoder.draft_forwards)


def _blocks(task: Task) -> Texts:
    decoder = ExactJointDecoder(task.network, block=2, eos_id=task.eos_ids, logprobs=True)
    texts = _streamed(task, decoder)
    return texts._replace(forwards=2 * texts.forwards + 1)  # one read the prompts


def _chain(task: Task, heads: int | None, sampling: Sampling) -> Texts:
    heads = task.heads if heads is None else heads
    decoder = ChainDecoder(task.network, heads=heads, sampling=sampling, logprobs=True)
    return _streamed(task, decoder)


def _draft_model(task: Task) -> Texts:
    assert task.drafter is not None
    decoder = DraftModelDecoder(
        task.network, drafter=task.drafter, drafts=DRAFTS, sampling=SAMPLED, logprobs=True
    )
    texts = _streamed(task, decoder)
    return texts._replace(draft_forwards=1 + DRAFTS * texts.forwards)


def _streamed(task: Task, decoder: ChainDecoder) -> Texts:
    pieces = stream(decoder, task.prompts, max_new_tokens=task.new_tokens, eos_id=task.eos_ids)
    found = collect(pieces, len(task.prompts))
    assert found.logprobs is not None
    return Texts(found.tokens, found.logprobs, found.forwards, 0)


def _logprobs(ranked: Sequence[Sequence[Beam]]) -> list[list[float]]:
    return [list(beams[0].logprobs) for beams in ranked]


def measure(way: Way, task: Task, rounds: int, questions: Questions | None) -> Row:
    """The texts, which are the same in every round, and the fastest round's time."""
    short = task._replace(prompts=task.prompts[:1], new_tokens=2)
    memory_mib = grown_mib(lambda: way.run(short), lambda: way.run(task))
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
        memory_mib,
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


def _task(loaded: LoadedNetwork, draft: Path | None, new_tokens: int, texts: int) -> Task:
    prompts = [loaded.tokenizer.encode(PROMPTS[n % len(PROMPTS)]).ids for n in range(texts)]
    drafter = None if draft is None else load_drafter(draft, loaded)
    return Task(loaded.network, drafter, prompts, loaded.eos_ids, new_tokens)


def _questions(export: Path, count: int) -> Questions:
    """The same ones each time, of one and two operations."""
    loaded, generator = load_network(export), random.Random(1_000)
    problems = [make_problem(generator, 1 + n % _OPERATIONS) for n in range(count)]
    prompts = [loaded.tokenizer.encode(problem.question).ids for problem in problems]
    task = Task(loaded.network, None, prompts, loaded.eos_ids, SIZE)
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
    task = _task(loaded, options.draft, options.tokens, options.texts)
    questions = None
    if options.arithmetic is not None:
        questions = _questions(options.arithmetic, options.questions)
    rows = []
    for way in ways(drafter=task.drafter is not None):
        rows.append(measure(way, task, options.rounds, questions))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))
    if options.output is None:
        return
    description = loaded.record.description
    machine = machine_line("cpu", ("torch",))
    size = description.model.num_parameters() / 1e6
    small = task.drafter.config.num_parameters() / 1e6 if task.drafter is not None else None
    intro = (
        f"{machine} {description.run}: {size:.1f} M parameters, step {description.step}"
        + ("" if small is None else f"; the draft model has {small:.2f} M")
        + f". {options.texts} texts of at most {options.tokens} new tokens, {DRAFTS} drafts, "
        f"by heads {task.heads - 1}."
    )
    if questions is not None:
        intro += f" Right: of {options.questions} questions."
    replace_section(
        options.output / "README.md", "decoding_quality cpu", f"{intro}\n\n{table(rows)}"
    )
    raw = options.output / "results" / "decoding_quality-cpu.json"
    content = {"machine": machine, "results": [row._asdict() for row in rows]}
    raw.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
