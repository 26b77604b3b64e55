"""Batches copied ahead: which steps come, and when their copies begin (tests/gpu has the rest)."""

from collections.abc import Generator

import torch

from data_prep.loading.loader import Batch
from pipeline.data.batch_order import BatchPosition, StepBatches
from pipeline.data.device_copies import _one_ahead, batches_on


def make_step(number: int) -> StepBatches:
    """A step with two micro-batches that hold its number."""
    tokens = torch.full((2, 3), number)
    batch = Batch(tokens, tokens.repeat(2, 1, 1))
    return StepBatches(BatchPosition(number, number * 4, 0), [batch, batch])


def make_steps(count: int, closed: list[bool]) -> Generator[StepBatches, None, None]:
    """So many steps; tells when it is closed or at its end."""
    try:
        for number in range(1, count + 1):
            yield make_step(number)
    finally:
        closed.append(True)


def test_on_a_cpu_steps_pass_as_they_are() -> None:
    """The same objects, and closing reaches the reader."""
    closed: list[bool] = []
    steps = batches_on(torch.device("cpu"), make_steps(5, closed))
    assert next(steps).position.batch == 1
    assert torch.equal(next(steps).micro_batches[0].tokens, torch.full((2, 3), 2))
    assert closed == []
    steps.close()
    assert closed == [True]


class Recorder:
    """A copier that only says what it is asked for."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def begin(self, step: StepBatches) -> StepBatches:
        """Note the step."""
        self.events.append(("begin", step.position.batch))
        return step

    def finish(self, step: StepBatches) -> StepBatches:
        """Note it again."""
        self.events.append(("finish", step.position.batch))
        return step


def test_a_steps_copies_begin_before_the_step_before_it() -> None:
    """Every step comes once, in order, the last one too."""
    copier = Recorder()
    ahead = _one_ahead(copier, make_steps(3, []))  # type: ignore[arg-type]
    found = []
    for step in ahead:
        copier.events.append(("train", step.position.batch))
        found.append(step.position.batch)
    assert found == [1, 2, 3]
    assert copier.events.index(("begin", 3)) < copier.events.index(("train", 2))
    assert copier.events.index(("begin", 2)) < copier.events.index(("train", 1))
    assert [e for e in copier.events if e[0] == "finish"] == [("finish", n) for n in (1, 2, 3)]
