"""Flex attention's training on a CPU: all that runs on a GPU but the kernel itself."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch.nn.attention import flex_attention

import model.operations.attention
import model.operations.documents


@contextlib.contextmanager
def blocks_on_cpu() -> Iterator[None]:
    """Masks have the form of blocks, and flex attention is traced and differentiated.

    As `torch.compile` does on a GPU, into a graph of forward and one of backward; then the graphs
    run as they are, where a GPU would have kernels. Torch refuses backward on CPUs for the lack of
    such a kernel; that check is lifted.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex_attention, "_validate_device", lambda *_: None)
        compiled = torch.compile(flex_attention.flex_attention, backend="aot_eager")
        patch.setattr(model.operations.attention, "_flex_attention", lambda: compiled)
        patch.setattr(model.operations.documents, "takes_blocks", lambda *_: True)
        yield
    torch.compiler.reset()
