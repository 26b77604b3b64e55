"""Gradients that are not finite: seen before the optimizer moves, and forgotten without a trace."""

from typing import Any

import torch
from torch import Tensor, nn


def gradients_finite(
    model: nn.Module, optimizer: Any, *, zero: int, device: torch.device
) -> Tensor:
    """Whether the gradients of this rank are finite, as a bool on `device`.

    Args:
        model: the engine's module.
        optimizer: the engine's optimizer; with ZeRO it asks all ranks of its group.
        zero: ZeRO stage.
        device: of the result.
    """
    finite = torch.ones((), dtype=torch.bool, device=device)
    if zero:
        return finite & (not optimizer.has_overflow())
    for parameter in model.parameters():
        if parameter.grad is not None:
            finite &= parameter.grad.isfinite().all()
    return finite


def discard_gradients(engine: Any, *, zero: int) -> None:
    """Forget the gradients of a step that will not be taken.

    DeepSpeed has no call for this: each ZeRO stage keeps its sums elsewhere.

    Args:
        engine: DeepSpeed's.
        zero: ZeRO stage.
    """
    optimizer = engine.optimizer
    if zero == 0:
        engine.zero_grad()
        optimizer.zero_grad()
    else:
        optimizer.zero_grad()
        for index in list(optimizer.averaged_gradients):
            optimizer.averaged_gradients[index] = None
    if zero in (1, 2):
        for index in list(optimizer.all_grad_tensors):
            optimizer.all_grad_tensors[index] = None
        optimizer.micro_step_id = -1
    if zero == 3:
        optimizer.averaged_gradients = {}
