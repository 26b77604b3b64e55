"""Elementwise operations as kernels that torch.compile makes of their plain definitions.

Each reads its inputs once and writes its result once, in forward and in backward, where eager
operations go through memory several times. In exchange every process compiles at its start.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.errors import ConfigError

logger = logging.getLogger(__name__)


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled when it is first called."""
    # In this process: a pool of compilers in every rank would outlive their little work.
    return torch.compile(function, options={"compile_threads": 1})


def plain_add_(total: Tensor, addend: Tensor) -> None:
    """Add one tensor to another of more digits, in place; to be compiled.

    On a GPU torch's own addition of two dtypes converts number by number as it goes, which takes
    longer than memory does.

    Args:
        total: `[numbers]`.
        addend: `[numbers]`.
    """
    total.add_(addend)


def check_compiler(device: torch.device) -> None:
    """See that something can be compiled for this device.

    Raises:
        ConfigError: it cannot.
    """
    ones = torch.ones(2, 2, device=device)
    try:
        compiled(_double)(ones)
    except Exception as error:  # torch has no common class for what can go wrong here
        what = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"torch.compile fails on this machine ({what}); install a C++ compiler (for a GPU, "
            "Triton as well), or set train.compile=false"
        ) from None


def can_compile(device: torch.device) -> bool:
    """Whether something can be compiled for this device; the log says why not."""
    try:
        check_compiler(device)
    except ConfigError as error:
        logger.warning("torch.compile cannot be used, so that steps are slower: %s", error)
        return False
    return True


def _double(numbers: Tensor) -> Tensor:
    return numbers * 2
