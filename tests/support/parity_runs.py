"""Training a few steps in any layout, recording what must not depend on the layout."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.engine.build import build_engine
from pipeline.engine.engine import Engine
from tests.support.engine_cases import Case, build_topology, engine_config, local_batches, whole
from tests.support.engine_probes import gradients, parameters
from tests.support.harness import run_ranks

# What summing the same numbers in another order may change, relative to the norm of the result.
# First step: 32 roundings of fp32 (2**-24 each); sums run over at most 96 targets in six layers.
# Seen: at most 5.3e-7 over all layouts, on two kinds of CPU.
FIRST_STEP = 32 * 2.0**-24
# Later steps: Adam's first updates are lr * g / |g|, so that an entry whose gradient is as small
# as its own rounding error moves by up to lr either way, in one layout otherwise than in another.
# How many such entries there are depends on the CPU's kernels. Seen: at most 1.1e-5. A gradient
# that is left out, doubled or leaks from the step before shows far above either.
LATER_STEPS = 5e-5


@dataclass(frozen=True)
class Step:
    """What is compared of one step; gradients those of the parameters that the rank holds."""

    head_losses: list[float]
    grad_norm: float
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Course:
    """A few steps, and the weights after them."""

    steps: list[Step]
    weights: dict[str, Tensor]


def train_in_ranks(case: Case, num_steps: int) -> Course:
    """Train in the case's layout; gradients and weights are gathered from all its stages."""
    # Where nothing is in torch's cache, compiling takes minutes on a busy machine.
    timeout_s = 600.0 if case.compiled else 120.0
    courses = run_ranks(case.world, _train, case, num_steps, timeout_s=timeout_s)
    steps = []
    for number, step in enumerate(courses[0].steps):
        gradients: dict[str, Tensor] = {}
        for course in courses:
            gradients |= course.steps[number].gradients
            assert course.steps[number].head_losses == step.head_losses
            assert course.steps[number].grad_norm == step.grad_norm
        steps.append(Step(step.head_losses, step.grad_norm, gradients))
    weights = {name: weight for course in courses for name, weight in course.weights.items()}
    return Course(steps, weights)


def assert_same_course(actual: Course, expected: Course) -> None:
    """Losses, norms, every gradient of every step, and the last weights agree."""
    for number, (step, wanted) in enumerate(zip(actual.steps, expected.steps, strict=True)):
        tolerance = LATER_STEPS if number else FIRST_STEP
        assert relative_difference(step.head_losses, wanted.head_losses) < tolerance
        assert relative_difference(step.grad_norm, wanted.grad_norm) < tolerance
        assert step.gradients.keys() == wanted.gradients.keys()
        for name, gradient in wanted.gradients.items():
            assert relative_difference(step.gradients[name], gradient) < tolerance, name
    assert actual.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        assert relative_difference(actual.weights[name], weight) < LATER_STEPS, name


def relative_difference(actual: Any, expected: Any) -> float:
    """Norm of the difference over the norm of what is expected; 0 where both are zero."""
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))


def _train(case: Case, num_steps: int) -> Course:
    topology = build_topology(case)
    engine = build_engine(engine_config(case), topology, case.precision)
    recorded: list[dict[str, Tensor]] = []
    record_gradients(engine, recorded)
    steps = []
    for step in range(num_steps):
        batches = local_batches(step, case, topology.data_rank)
        result = engine.train_step(batches, learning_rate=1e-3)
        assert result.applied
        steps.append(Step(result.head_losses.tolist(), result.grad_norm, recorded[-1]))
    weights = {
        name: whole(name, weight.float().clone(), topology) for name, weight in parameters(engine)
    }
    return Course(steps, weights)


def record_gradients(engine: Engine, recorded: list[dict[str, Tensor]]) -> None:
    """Keep each step's gradients as they are just before the optimizer moves."""
    apply = engine._apply

    def record_and_apply(learning_rate: float) -> float | None:
        recorded.append(
            {
                name: whole(name, gradient.detach().float().clone(), engine.topology)
                for name, gradient in gradients(engine)
            }
        )
        return apply(learning_rate)

    engine._apply = record_and_apply  # type: ignore[method-assign]
