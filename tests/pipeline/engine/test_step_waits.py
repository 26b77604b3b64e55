"""What a step makes the host wait for, and what it sends: nothing grows with its micro-batches."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.engine.build import build_engine
from pipeline.engine.engine import Engine
from tests.support.engine_cases import (
    HEADS,
    SEQUENCE,
    Case,
    build_topology,
    engine_config,
    local_batches,
)
from tests.support.harness import run_ranks
from tests.support.long_forms import part_of

STAGES = "trunk 0-2|heads 1-3"
CASES = [
    Case(world=2, zero=zero, accumulation=4, stages=stages, precision="bf16")
    for stages in ("1", STAGES)
    for zero in (0, 1, 2, 3)
]


def _engine(case: Case) -> tuple[Engine, Callable[[int], None]]:
    """An engine, and what takes one of its steps."""
    topology = build_topology(case)
    engine = build_engine(engine_config(case), topology, case.precision)

    def step(number: int) -> None:
        engine.train_step(local_batches(number, case, topology.data_rank), learning_rate=1e-3)

    return engine, step


def _evaluate(case: Case, engine: Engine) -> None:
    engine.evaluate(local_batches(9, case, engine.topology.data_rank))


def _count_device_waits(case: Case) -> int:
    """How often steps and evaluations wait for the whole device."""
    engine, step = _engine(case)
    waits: list[str] = []
    get_accelerator().synchronize = lambda *_: waits.append("device")
    for number in range(6):
        step(number)
        _evaluate(case, engine)
    return len(waits)


@pytest.mark.parametrize(
    "case",
    # Both optimizers of DeepSpeed, with and without stages.
    part_of(CASES, lambda _, case: (case.stages, case.zero) in (("1", 3), (STAGES, 1))),
    ids=lambda case: f"{case.stages}-{case.zero}",
)
def test_a_step_never_waits_for_the_whole_device(case: Case) -> None:
    """DeepSpeed's throughput timer did from the third step on, in every forward.

    A stage would wait for a receive that it has posted ahead, whose sender waits for this stage
    (`tests/pipeline/stages/test_stream_waits.py` plays that through).
    """
    assert run_ranks(2, _count_device_waits, case) == [0, 0]


class _Reads(TorchDispatchMode):
    """Notes who asks for a tensor's value: on a GPU the host would wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.by: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "equal"):
            self.note()
        return function(*args, **(kwargs or {}))

    def note(self) -> None:
        """Who: the innermost function of this project's or DeepSpeed's."""
        frame = sys._getframe(1)
        while frame is not None:
            name = frame.f_globals.get("__name__", "")
            if name.split(".")[0] in ("deepspeed", "pipeline", "model"):
                self.by.append(f"{name.split('.')[0]} {frame.f_code.co_name}")
                return
            frame = frame.f_back  # type: ignore[assignment]


@contextmanager
def _reads() -> Iterator[list[str]]:
    """Who reads values in here."""
    to_list = torch.Tensor.tolist
    with _Reads() as mode, pytest.MonkeyPatch.context() as patch:

        def noted(tensor: torch.Tensor) -> Any:
            mode.note()
            return to_list(tensor)

        patch.setattr(torch.Tensor, "tolist", noted)
        yield mode.by


def _who_reads(case: Case) -> tuple[list[str], list[str], list[str]]:
    """In forward and backward of a step's micro-batches, in all of the step, in an evaluation."""
    engine, step = _engine(case)
    for number in range(5):  # until ZeRO-3 has learned the order of modules, and compared it
        step(number)
    inside: list[str] = []
    run = engine.execution.run

    def watched(*args: Any) -> Any:
        with _reads() as by:
            sums = run(*args)
        inside.extend(by)
        return sums

    engine.execution.run = watched  # type: ignore[method-assign, assignment]
    with _reads() as whole:
        step(5)
    with _reads() as evaluation:
        _evaluate(case, engine)
    # What DeepSpeed reads outside of forward and backward is its own affair, and ZeRO-3's comparing
    # of the order of modules (`assert_same`), which an evaluation changes.
    ours = [
        [by for by in found if by.startswith("pipeline") and not by.endswith("assert_same")]
        for found in (whole, evaluation)
    ]
    return inside, ours[0], ours[1]


@pytest.mark.parametrize(
    "case",
    part_of(
        [*CASES, *(replace(case, documents=True) for case in CASES)],
        lambda number, case: number in (1, 7) or (case.documents and case.zero == 3),
    ),
    ids=str,
)
def test_values_stay_on_the_device(case: Case) -> None:
    """Of a step only what all ranks agree on and the norm are read, when all backwards are done."""
    for inside, whole, evaluation in run_ranks(2, _who_reads, case):
        assert inside == []
        assert whole == ["pipeline agree", "pipeline _apply"]
        assert set(evaluation) == {"pipeline from_sums"}


def _sent_gradients(case: Case) -> tuple[dict[str, int], int]:
    """Elements that DeepSpeed reduces in a step, by operation; and those of the model."""
    engine, step = _engine(case)
    step(0)
    sent: dict[str, int] = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "reduce", "reduce_scatter_tensor"):
            real = getattr(dist, name)

            def counted(*args: Any, _name: str = name, _real: Any = real, **options: Any) -> Any:
                tensors = [t for t in (*args, *options.values()) if isinstance(t, torch.Tensor)]
                if max(t.numel() for t in tensors) > HEADS * SEQUENCE:
                    sent[_name] = sent.get(_name, 0) + tensors[0].numel()
                return _real(*args, **options)

            patch.setattr(dist, name, counted)
        step(1)
    return sent, sum(weight.numel() for weight in engine.model.parameters())


@pytest.mark.parametrize("accumulation", [1, 4])
def test_zero_1_sends_gradients_once_a_step(accumulation: int) -> None:
    """Each to the rank that owns it, however many micro-batches were added up before."""
    case = Case(world=2, zero=1, accumulation=accumulation, precision="bf16")
    for sent, parameters in run_ranks(2, _sent_gradients, case):
        assert sent == {"reduce": parameters}
