"""The plan's memory against real ranks: three of the benchmark's layouts, and its meter."""

import pytest
import torch

from benchmarks.live_tensors import LiveTensorMeter
from benchmarks.plan import CASES, QUICK, TOLERANCE, Case, compare, run_config, table


@pytest.mark.parametrize("case", QUICK, ids=Case.describe)
def test_prediction_is_within_a_tenth_of_what_ranks_hold(case: Case) -> None:
    """States, the most of computing and the most of stepping, in the stage furthest away."""
    row = compare(case)
    assert row.error <= TOLERANCE, row
    assert case.describe() in table({case: row})


def test_the_layouts_are_runs_and_cover_what_a_plan_may_be() -> None:
    """ZeRO 0 to 3, tensor 1 and 2, stages 1 to 3, every checkpointing mode, 1 to 4 heads."""
    assert len({run_config(case).model_dump_json() for case in CASES}) == len(CASES) >= 12
    for name, values in {
        "zero": {0, 1, 2, 3},
        "tensor": {1, 2},
        "stages": {1, "auto:2", "auto:3"},
        "checkpointing": {"none", "full", "selective"},
        "heads": {1, 2, 3, 4},
        "precision": {"fp32", "bf16"},
    }.items():
        assert {getattr(case, name) for case in CASES} == values


def test_the_meter_counts_each_storage_from_its_birth_to_its_end() -> None:
    """Views are the same memory; what autograd keeps lives until backward; nothing is left."""
    with LiveTensorMeter() as meter:
        x = torch.ones(256, requires_grad=True)
        y = x * 2
        view = y[:100]
        assert meter.alive == 2 * 1024
        kept = y.exp()
        total = kept.sum()
        del y, view, kept
        assert meter.alive == 2 * 1024 + 4  # x, exp(y) for its own backward, the sum
        total.backward()
        del total
        assert meter.alive == 2 * 1024  # x and its gradient
        assert meter.peak >= 3 * 1024
        meter.restart_peak()
        assert meter.peak == meter.alive
        x.grad = None
        del x
        assert meter.alive == 0
