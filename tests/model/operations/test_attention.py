"""Core attention against softmax written out."""

import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.operations.attention import CoreAttention, attend
from model.operations.documents import bias_within

SEQUENCE, BATCH, HEADS, WIDTH = 9, 2, 4, 8
TOLERANCE = 1e-12  # float64; the largest difference seen is 1e-15


class Inputs(NamedTuple):
    """Queries `[S, B, A, D]`, keys and values `[S, B, G, D]`."""

    query: Tensor
    key: Tensor
    value: Tensor


def make_inputs(groups: int, seed: int = 0) -> Inputs:
    """Random float64 inputs with this many key-value heads."""
    generator = torch.Generator().manual_seed(seed)
    return Inputs(
        *(
            torch.randn(
                SEQUENCE, BATCH, heads, WIDTH, generator=generator, dtype=torch.float64
            ).requires_grad_()
            for heads in (HEADS, groups, groups)
        )
    )


def attention(recompute: bool = False) -> CoreAttention:
    """The module as megatron builds it."""
    module = CoreAttention(None, layer_number=1, attn_mask_type=None, attention_type="self")
    module.recompute = recompute
    return module


def written_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of each head and position in turn, over the positions up to it."""
    per_group = query.shape[2] // key.shape[2]
    outputs = []
    for position in range(query.shape[0]):
        heads = []
        for head in range(query.shape[2]):
            keys = key[: position + 1, :, head // per_group]
            values = value[: position + 1, :, head // per_group]
            scores = (query[position, :, head] * keys).sum(-1) / math.sqrt(query.shape[3])
            heads.append((scores.softmax(dim=0).unsqueeze(-1) * values).sum(0))
        outputs.append(torch.cat(heads, dim=-1))
    return torch.stack(outputs)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("recompute", [False, True])
def test_equals_softmax_written_out(groups: int, recompute: bool) -> None:
    """Output `[S, B, A * D]` and all three gradients, causal, with grouped queries."""
    inputs = make_inputs(groups)
    output = attention(recompute)(*inputs)
    expected = written_out(*inputs)
    assert output.shape == (SEQUENCE, BATCH, HEADS * WIDTH)
    torch.testing.assert_close(output, expected, rtol=0, atol=TOLERANCE)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    found = torch.autograd.grad((output * weights).sum(), inputs)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    for gradient, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=0, atol=TOLERANCE)


def test_no_position_sees_a_later_one() -> None:
    """Other keys and values from position 5 on change nothing before it, bit for bit."""
    first, other = make_inputs(2), make_inputs(2, seed=1)
    changed = Inputs(
        first.query,
        torch.cat((first.key[:5], other.key[5:])),
        torch.cat((first.value[:5], other.value[5:])),
    )
    before, after = attention()(*first), attention()(*changed)
    assert torch.equal(before[:5], after[:5])
    assert not torch.isclose(before[5:], after[5:]).any()


def test_query_groups_read_their_own_keys() -> None:
    """With 2 groups of 2 queries, another key of group 1 changes query heads 2 and 3 alone."""
    inputs = make_inputs(2)
    key = inputs.key.detach().clone()
    key[:, :, 1] += 1.0 + torch.arange(SEQUENCE).view(-1, 1, 1)
    shape = (SEQUENCE, BATCH, HEADS, WIDTH)
    before = attention()(*inputs).view(shape)
    after = attention()(inputs.query, key, inputs.value).view(shape)
    assert torch.equal(before[:, :, :2], after[:, :, :2])
    assert not torch.equal(before[:, :, 2:], after[:, :, 2:])


def test_a_bias_on_a_gpu_goes_to_a_kernel_that_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to cuDNN's, which may give gradients that are no numbers; without groups of queries."""
    inputs = make_inputs(groups=2)
    bias = bias_within(torch.arange(SEQUENCE).expand(BATCH, -1) // 4, torch.float64)
    expected = attend(*inputs, bias)
    calls: list[tuple[int, bool, bool, bool]] = []
    real = F.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        allowed = torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()
        calls.append((key.shape[1], options["enable_gqa"], *allowed))
        return real(query, key, value, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    found = attend(*inputs, bias)
    assert calls == [(HEADS, False, False, False)]
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
