"""pass@k: the chance that one of k completions is right (Chen et al. 2021)."""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from model.errors import ConfigError
from pipeline.evaluating.completions import Drawing, draw
from pipeline.evaluating.model_folder import EvaluatedModel
from pipeline.evaluating.problems import Problem
from pipeline.sandbox.run import Sandbox, SandboxUnavailableError, Verdict


class Sample(NamedTuple):
    """One completion and how its program ended.

    Attributes:
        task_id: of its problem.
        completion: what the model wrote.
        passed: whether the checks came to their end.
        reason: "passed", or why not.
    """

    task_id: str
    completion: str
    passed: bool
    reason: str


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The unbiased estimate from `samples` completions of a problem, `passed` of them right.

    1 - C(samples - passed, k) / C(samples, k): the share of sets of k of them with a right one.
    """
    assert 0 <= passed <= samples, (passed, samples)
    assert 1 <= k <= samples, (k, samples)
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


def mean_pass_at_k(samples: Sequence[Sample], ks: Sequence[int]) -> dict[int, float]:
    """The mean estimate over problems, for each k."""
    counts: dict[str, list[bool]] = {}
    for sample in samples:
        counts.setdefault(sample.task_id, []).append(sample.passed)
    return {
        k: sum(pass_at_k(len(found), sum(found), k) for found in counts.values()) / len(counts)
        for k in ks
    }


def solve(
    model: EvaluatedModel,
    problems: Sequence[Problem],
    drawing: Drawing,
    sandbox: Sandbox,
    workers: int,
) -> Iterator[list[Sample]]:
    """Draw completions of every problem and run them; while they run, the next are drawn.

    Args:
        model: the model.
        problems: the problems.
        drawing: how completions are drawn.
        sandbox: where their programs run.
        workers: programs that run at once.

    Yields:
        The samples of each problem, `drawing.samples` of them.

    Raises:
        ConfigError: the machine refuses to start a program.
    """
    pool = ThreadPoolExecutor(workers, "sandbox")
    try:
        running: list[tuple[Problem, list[str], list[Future[Verdict]]]] = []
        for problem in problems:
            completions = list(draw(model, problem, drawing))
            verdicts = [
                pool.submit(sandbox.run, problem.program(completion)) for completion in completions
            ]
            running.append((problem, completions, verdicts))
            if len(running) > 1:
                yield _samples(*running.pop(0), drawing.samples)
        for waiting in running:
            yield _samples(*waiting, drawing.samples)
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C nobody waits for those that are queued


def _samples(
    problem: Problem, completions: list[str], verdicts: list[Future[Verdict]], count: int
) -> list[Sample]:
    if not completions:
        reason = "its prompt is as long as what the model was trained on"
        return [Sample(problem.task_id, "", False, reason)] * count
    try:
        return [
            Sample(problem.task_id, completion, *verdict.result())
            for completion, verdict in zip(completions, verdicts, strict=True)
        ]
    except SandboxUnavailableError as error:
        raise ConfigError(
            f"a program of {problem.task_id} cannot be started ({error}); run again with fewer "
            "--workers"
        ) from None
