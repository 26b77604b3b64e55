"""Evaluation by the engine: losses and head agreement, with and without masked documents."""

import contextlib
import functools
import os
import signal
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from data_prep.loading.loader import Batch
from pipeline.distributed.agreement import Agreed, RankFlags
from pipeline.distributed.rendezvous import rank_info
from pipeline.distributed.topology import Topology
from pipeline.engine.build import build_engine
from pipeline.engine.engine import StepResult
from pipeline.engine.evaluation import EvalResult
from tests.support.engine_cases import (
    Case,
    build_topology,
    engine_config,
    global_batch,
    global_documents,
    local_batches,
    within_documents,
)
from tests.support.flex_on_cpu import blocks_on_cpu
from tests.support.harness import run_ranks


def _evaluate(case: Case) -> tuple[EvalResult, EvalResult]:
    """Of rows of several documents, and of the documents as rows of their own."""
    topology = Topology(rank_info(os.environ), case.tensor, torch.device("cpu"))
    engine = build_engine(engine_config(case), topology, "fp32")
    tokens, labels = global_batch(0)
    documents = global_documents(0)
    labels = within_documents(labels, documents)
    alone = []
    for row in range(len(tokens)):
        for document in documents[row].unique():
            place = documents[row] == document
            alone.append(Batch(tokens[row : row + 1, place], labels[:, row : row + 1, place]))
    assert len(alone) > 2 * len(tokens)
    return engine.evaluate([Batch(tokens, labels, documents)]), engine.evaluate(alone)


@pytest.mark.parametrize("case", [Case(documents=True), Case(2, tensor=2, zero=3, documents=True)])
def test_documents_are_evaluated_as_if_alone(case: Case) -> None:
    """The losses of all heads, up to the rounding of fp32."""
    for packed, alone in run_ranks(case.world, _evaluate, case):
        assert packed.head_losses == pytest.approx(alone.head_losses, rel=1e-5)


def _train(case: Case, blocks: bool) -> list[StepResult]:
    """Three steps, with masks as blocks or as a bias."""
    topology = Topology(rank_info(os.environ), case.tensor, torch.device("cpu"))
    with blocks_on_cpu() if blocks else contextlib.nullcontext():
        engine = build_engine(engine_config(case), topology, "fp32")
        return [
            engine.train_step(local_batches(step, case, topology.data_rank), learning_rate=1e-3)
            for step in range(3)
        ]


def test_blocks_train_under_zero_3() -> None:
    """Masks as a GPU has them pass DeepSpeed's hooks and recomputed layers: the same steps."""
    case = Case(2, zero=3, accumulation=2, checkpointing="full", documents=True)
    expected = run_ranks(2, _train, case, False)[0]
    for step, wanted in zip(run_ranks(2, _train, case, True)[0], expected, strict=True):
        assert step.head_losses.tolist() == pytest.approx(wanted.head_losses.tolist(), rel=1e-5)
        assert step.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-5)


def _same(flags: RankFlags) -> RankFlags:
    return flags


def _exchanges(case: Case) -> tuple[list[int], list[Agreed]]:
    """Sizes of what a step reduces over all ranks, and what each step agreed on."""
    topology = build_topology(case)
    engine = build_engine(engine_config(case), topology, "fp32")
    sizes: list[int] = []
    reduce = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **options: Any) -> Any:
        if sys._getframe(1).f_code.co_name == "agree":
            sizes.append(tensor.numel())
        return reduce(tensor, *args, **options)

    dist.all_reduce = counted
    agreed = []
    for step, done in enumerate((True, False)):
        flags = RankFlags(
            signal=signal.SIGUSR1 if step and topology.info.rank == 1 else 0,
            save_done=done or topology.info.rank == 0,
        )
        batches = local_batches(step, case, topology.data_rank)
        agreed.append(engine.train_step(batches, 1e-3, functools.partial(_same, flags)).agreed)
    dist.all_reduce = reduce
    return sizes, agreed


def test_one_exchange_per_step_carries_every_flag() -> None:
    """Finite check, stop signal and finished saves cost one reduction of three numbers a step."""
    for sizes, agreed in run_ranks(2, _exchanges, Case(world=2, zero=1)):
        assert sizes == [3, 3]
        assert agreed == [(True, None, True), (True, "SIGUSR1", False)]
