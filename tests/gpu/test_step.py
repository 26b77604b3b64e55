"""One step on a GPU against the same step computed on the CPU by autograd alone."""

from functools import cache
from typing import Any

import pytest
import torch

from pipeline.config.run_config import RunConfig
from tests.support.device_engine import DeviceStep, computed_on_cpu, device_config, train_on
from tests.support.parity_runs import relative_difference

# fp32 on both, sums of up to 1024 targets in another order: 2**-24 each, seldom all one way.
FP32 = 256 * 2.0**-24
CASES: dict[str, dict[str, Any]] = {
    **{f"zero {zero}": {"parallel": {"zero": zero}} for zero in (0, 1, 2, 3)},
    **{
        f"{mode} checkpointing, zero {zero}": {
            "parallel": {"zero": zero},
            "train": {"steps": 10, "activation_checkpointing": mode},
        }
        for mode in ("full", "selective")
        for zero in (1, 3)
    },
    "joint backward": {"train": {"steps": 10, "head_backward": "joint"}},
    "document mask": {"data": {"document_mask": True}},
    "document mask, zero 3, full checkpointing": {
        "data": {"document_mask": True},
        "parallel": {"zero": 3},
        "train": {"steps": 10, "activation_checkpointing": "full"},
    },
}


def _config(case: str) -> RunConfig:
    return device_config(**CASES[case])


@cache
def _on_cpu(documents: bool, precision: Any) -> DeviceStep:
    return computed_on_cpu(device_config(data={"document_mask": documents}), precision)


def _distance(found: DeviceStep, wanted: DeviceStep) -> float:
    pairs = [(found.gradients[name], value) for name, value in wanted.gradients.items()]
    square = sum(float((a.float() - b).norm() ** 2) for a, b in pairs)
    return float((square / sum(float(b.norm() ** 2) for _, b in pairs)) ** 0.5)


@pytest.mark.parametrize("case", CASES)
def test_fp32_step_is_the_cpus(device: torch.device, case: str) -> None:
    """Losses of all heads, the norm, and every gradient."""
    config = _config(case)
    found = train_on(device, config, "fp32")[0]
    wanted = _on_cpu(config.data.document_mask, "fp32")
    assert relative_difference(found.head_losses, wanted.head_losses) < FP32
    assert found.grad_norm == pytest.approx(wanted.grad_norm, rel=FP32)
    assert found.gradients.keys() == wanted.gradients.keys()
    for name, gradient in wanted.gradients.items():
        assert relative_difference(found.gradients[name], gradient) < FP32, name


@pytest.mark.parametrize("case", CASES)
def test_bf16_step_is_as_near_to_fp32_as_a_cpus(device: torch.device, case: str) -> None:
    """The yardstick is what bf16 costs in plain autograd on the CPU."""
    config = _config(case)
    found = train_on(device, config, "bf16")[0]
    truth = _on_cpu(config.data.document_mask, "fp32")
    yardstick = _distance(_on_cpu(config.data.document_mask, "bf16"), truth)
    assert yardstick > 2.0**-9
    assert _distance(found, truth) < 1.6 * yardstick
    assert found.grad_norm == pytest.approx(truth.grad_norm, rel=yardstick)
    assert relative_difference(found.head_losses, truth.head_losses) < yardstick / 20


def test_steps_stay_together(device: torch.device) -> None:
    """Over five steps each ZeRO level trains as level 0 does."""
    courses = {zero: train_on(device, _config(f"zero {zero}"), "fp32", 5) for zero in range(4)}
    for zero in (1, 2, 3):
        for step, wanted in zip(courses[zero], courses[0], strict=True):
            assert relative_difference(step.head_losses, wanted.head_losses) < 1e-4
            assert step.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-3)
