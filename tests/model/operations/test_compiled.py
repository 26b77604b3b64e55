"""Kernels that torch.compile makes, against the functions that are there without it."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from model.errors import ConfigError
from model.loss import IGNORED, VocabularyShard, loss_and_gradients, plain_rows
from model.operations.compiled import can_compile, check_compiler, compiled, plain_add_
from model.operations.rms_norm import plain_rms_norm, rms_norm
from model.operations.rotary import RotaryTable
from model.operations.self_attention import split_and_rotate
from model.operations.swiglu import swiglu

CPU = torch.device("cpu")
# A rounding or two of the result; in bf16 the eager functions round between operations as well.
TOLERANCE = {torch.float32: 4 * 2.0**-24, torch.bfloat16: 4 * 2.0**-8}
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.stress)]


def _results(function: Callable[..., Tensor], inputs: list[Tensor], *rest: Any) -> list[Tensor]:
    """The value, and the gradient of every input."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    value = function(*leaves, *rest)
    weights = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value)
    value.backward(weights)
    return [value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["rms_norm", "swiglu"])
def test_a_compiled_kernel_computes_the_same(kind: str, dtype: torch.dtype) -> None:
    """Value and gradients, in the dtype of the input, to rounding."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(5, 2, 32, generator=generator).to(dtype)
    weight = torch.rand(32, generator=generator).to(dtype)
    if kind == "rms_norm":
        found = _results(compiled(plain_rms_norm), [hidden, weight], 1e-5)
        wanted = _results(rms_norm, [hidden, weight], 1e-5)
    else:
        found = _results(swiglu, [hidden], True)
        wanted = _results(swiglu, [hidden])
    assert len(found) == len(wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == theirs.dtype == dtype
        error = (mine.float() - theirs.float()).norm() / theirs.float().norm()
        assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("groups", "per_group", "batch"),
    [(2, 3, 2), pytest.param(4, 1, 1, marks=pytest.mark.stress)],
)
def test_compiled_rotation_is_the_same(
    dtype: torch.dtype, groups: int, per_group: int, batch: int
) -> None:
    """Queries, keys, values and the gradient, whatever strides the gradients come in."""
    length, width = 6, 8
    generator = torch.Generator().manual_seed(5)
    mixed = torch.randn(length, batch, groups * (per_group + 2) * width, generator=generator)
    positions = torch.randint(9, (batch, length), generator=generator)  # of documents kept apart
    rotation = RotaryTable(width, 100.0).rotation(positions, dtype)
    results = []
    for is_compiled in (True, False):
        leaf = mixed.to(dtype).requires_grad_()
        heads = split_and_rotate(leaf, rotation, groups, is_compiled)
        upstream = [
            torch.linspace(-1, 1, part.numel(), dtype=dtype).view(part.permute(1, 2, 0, 3).shape)
            for part in heads
        ]
        torch.autograd.backward(heads, [one.permute(2, 0, 1, 3) for one in upstream])
        assert leaf.grad is not None
        results.append([*(part.detach() for part in heads), leaf.grad])
        assert all(part.is_contiguous() for part in heads)
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype == dtype
        assert (mine.float() - theirs.float()).norm() / theirs.float().norm() < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [50, 3 * 1024])
def test_compiled_loss_is_the_same(dtype: torch.dtype, vocabulary: int) -> None:
    """Losses and both gradients, with ignored labels, a last chunk, large logits."""
    generator = torch.Generator().manual_seed(6)
    hidden = torch.randn(21, 16, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, 16, generator=generator).mul(8).to(dtype)
    labels = torch.randint(vocabulary, (21,), generator=generator)
    labels[[0, 9, 20]] = IGNORED
    results = []
    for is_compiled in (True, False):
        total, losses = torch.zeros(vocabulary, 16), torch.empty(21)
        found = loss_and_gradients(
            hidden,
            weight,
            labels,
            shard=VocabularyShard(0, vocabulary, None),
            scale=torch.tensor(0.125),
            weight_gradient=total,
            chunk_tokens=8,
            token_losses=losses,
            is_compiled=is_compiled,
        )
        results.append([found.loss_sum, found.hidden_gradient, total, losses])
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype
        error = (mine.float() - theirs.float()).norm() / theirs.float().norm()
        assert error < 4 * TOLERANCE[dtype]
    assert results[0][3][9] == 0


def test_a_row_in_parts_is_the_same_row() -> None:
    """Its softmax, wherever its largest logit and its label lie."""
    generator = torch.Generator().manual_seed(7)
    logits = 30 * torch.randn(9, 24, generator=generator)
    labels = torch.randint(24, (9,), generator=generator)
    labels[4] = IGNORED
    whole, parts = (
        plain_rows(logits.unflatten(1, (-1, width)), labels, 0, 0.5) for width in (24, 3)
    )
    for mine, theirs in zip(parts, whole, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_compiled_sums_are_the_same() -> None:
    """To the bit, of tensors of one length and then of others."""
    generator = torch.Generator().manual_seed(8)
    for length in (96, 7, 1000):
        total = torch.randn(length, generator=generator)
        addend = torch.randn(length, generator=generator).bfloat16()
        wanted = total + addend.float()
        compiled(plain_add_)(total, addend)
        assert torch.equal(total, wanted)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine where nothing can be compiled."""

    def broken(*_: Any, **__: Any) -> Any:
        def run(_: Tensor) -> Tensor:
            raise RuntimeError("No working C++ compiler found\nin $PATH")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    compiled.cache_clear()
    yield
    compiled.cache_clear()


@pytest.mark.usefixtures("no_compiler")
def test_left_to_itself_a_run_goes_on_without_a_compiler(caplog: pytest.LogCaptureFixture) -> None:
    """With torch's own kernels, and a line that says so."""
    with caplog.at_level(logging.WARNING):
        assert not can_compile(CPU)
    (record,) = caplog.records
    assert record.getMessage().startswith("torch.compile cannot be used, so that steps are slower")


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_run_is_refused() -> None:
    """At its start, in one line, with the way out."""
    with pytest.raises(ConfigError) as caught:
        check_compiler(CPU)
    message = str(caught.value)
    assert "No working C++ compiler found in $PATH" in message
    assert message.endswith("or set train.compile=false")
