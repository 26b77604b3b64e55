"""The choice of a kernel for attention, and attention through it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from model.errors import ConfigError
from model.operations.attention import attend
from model.operations.attention_backend import (
    AttentionBackend,
    AttentionShape,
    BackendChoice,
    can_use_on,
    choose_backend,
)
from model.operations.kernels import choose_kernels
from tests.support.tiny_model import training_model

GROUPED = AttentionShape(heads=8, kv_heads=2, head_dim=64, dtype=torch.bfloat16)
ALIKE = GROUPED._replace(kv_heads=8)
CUDNN, FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
CHOICES: tuple[BackendChoice, ...] = ("auto", "cudnn")
EFFICIENT, MATH = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH


class Gpu:
    """A GPU that has some kernels, some of them for grouped queries, too."""

    def __init__(self, *names: str, grouped: tuple[str, ...] = ()) -> None:
        self.names = (*names, "math")
        self.grouped = (*grouped, "math")

    def can_use(self, name: str, shape: AttentionShape, grouped: bool) -> bool:
        """As torch would say; groups exist where there are fewer keys."""
        assert grouped == (shape.heads != shape.kv_heads)
        return name in (self.grouped if grouped else self.names)


def test_cudnn_comes_first_and_the_others_stand_in() -> None:
    """A kernel that refuses a call leaves it to the next one, in the same order."""
    every = ("cudnn", "flash", "efficient")
    found = choose_backend("auto", GROUPED, Gpu(*every, grouped=every).can_use)
    assert found == AttentionBackend("cudnn", [CUDNN, FLASH, EFFICIENT, MATH], repeats=False)
    found = choose_backend("auto", ALIKE, Gpu("flash").can_use)
    assert found == AttentionBackend("flash", [FLASH, EFFICIENT, MATH], repeats=False)
    found = choose_backend("auto", ALIKE, Gpu().can_use)
    assert found == AttentionBackend("math", [MATH], repeats=False)


def test_keys_are_repeated_rather_than_leaving_the_kernel() -> None:
    """For a kernel without groups; one later in the order that has them does not win."""
    found = choose_backend("auto", GROUPED, Gpu("cudnn", "flash", grouped=("flash",)).can_use)
    assert found == AttentionBackend("cudnn", [CUDNN, FLASH, EFFICIENT, MATH], repeats=True)
    assert str(found) == "cudnn, keys and values repeated for each query"


def test_an_old_cudnn_is_left_out_where_it_reads_past_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For sequences that are no multiple of 128; unless it was asked for by name."""
    chosen = [choose_backend(name, ALIKE, Gpu("cudnn", "flash").can_use) for name in CHOICES]
    for version, is_old in ((91002, True), (91500, True), (91501, False), (None, False)):
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda found=version: found)
        found = [backend.kernels(length)[0] for backend in chosen for length in (256, 261)]
        assert found == [CUDNN, FLASH if is_old else CUDNN, CUDNN, CUDNN]


@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient"])
def test_a_chosen_kernel_is_used_or_refused(name: str) -> None:
    """No other one stands in for it."""
    order = choose_backend(name, ALIKE, Gpu(name).can_use).order  # type: ignore[arg-type]
    assert order == [{"cudnn": CUDNN, "flash": FLASH, "efficient": EFFICIENT}[name]]
    with pytest.raises(ConfigError, match=rf"train.attention={name} cannot be used.*8 heads of 64"):
        choose_backend(name, GROUPED, Gpu().can_use)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore")  # torch gives the reasons as warnings
def test_torch_is_asked_and_answers() -> None:
    """On a CPU: its kernels for GPUs cannot be used, and `math` can."""
    can_use = can_use_on(torch.device("cpu"))
    shape = GROUPED._replace(dtype=torch.float32)
    answers = [can_use(name, shape, True) for name in ("cudnn", "flash", "efficient", "math")]
    assert answers == [False, False, False, True]


def test_on_a_cpu_torch_chooses() -> None:
    """Whatever is asked for."""
    model = training_model()
    assert model.choose_attention("cudnn", torch.device("cpu")) is None


@pytest.mark.parametrize("repeats", [False, True])
def test_attention_through_a_backend_is_the_same(repeats: bool) -> None:
    """Output and gradients, with groups or with keys repeated."""
    generator = torch.Generator().manual_seed(4)
    sizes = ((9, 2, heads, 8) for heads in (4, 2, 2))
    inputs = [
        torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()
        for size in sizes
    ]
    backend = AttentionBackend("math", [MATH], repeats=repeats)
    query, key, value = inputs
    outputs = [attend(query, key, value, None, b) for b in (None, backend)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-13)
    weights = torch.linspace(-1, 1, outputs[0].numel()).double().view_as(outputs[0])
    gradients = [torch.autograd.grad(output, inputs, weights) for output in outputs]
    for found, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_the_backend_is_in_force_for_the_call_alone() -> None:
    """Torch's own order and switches are back afterwards."""
    before = torch._C._get_sdp_priority_order()
    part = torch.randn(4, 1, 2, 8)
    attend(part, part, part, None, AttentionBackend("math", [MATH], repeats=False))
    assert torch._C._get_sdp_priority_order() == before
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_the_choice_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """On a CPU it says who chooses, whatever was asked for."""
    with caplog.at_level("INFO"):
        choose_kernels(training_model(), "flash", torch.device("cpu"))
    assert caplog.messages == ["attention     by torch's own choice, as on every CPU"]


def test_the_kernel_that_a_gpu_has_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """By its name, and what was asked for."""
    flash = AttentionBackend("flash", [FLASH], repeats=False)
    on_gpu: Any = SimpleNamespace(dtype=torch.float32, choose_attention=lambda *_: flash)
    with caplog.at_level("INFO"):
        choose_kernels(on_gpu, "auto", torch.device("cuda", 0))
    assert caplog.messages == ["attention     by flash (train.attention=auto)"]
