"""What tests look at inside an engine, and training has no use for."""

from collections.abc import Iterator

import deepspeed
from torch import Tensor

from pipeline.engine.engine import Engine


def parameters(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of this tensor-parallel rank, gathered over ZeRO, one at a time.

    A collective: all ranks iterate together.
    """
    partitioned = engine.config.parallel.zero == 3
    for name, parameter in engine.model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=partitioned):
            yield name, parameter.detach()


def gradients(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Gradients of this rank's trained parameters, whole, before the optimizer moves."""
    for name, parameter in engine.model.named_parameters():
        if not parameter.requires_grad:
            continue
        if not engine._share.deepspeed_clips:
            assert parameter.grad is not None, name
            yield name, parameter.grad
        else:
            yield name, deepspeed.utils.safe_get_full_grad(parameter)
