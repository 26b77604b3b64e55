"""The chunked loss against torch's with whole logits, at a vocabulary of 128k."""

import pytest
import torch
import torch.nn.functional as F

from model.loss import VocabularyShard, loss_and_gradients
from tests.support.parity_runs import relative_difference


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("chunk", [333, 4096])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_loss_and_both_gradients(
    device: torch.device, dtype: torch.dtype, tolerance: float, chunk: int, is_compiled: bool
) -> None:
    """Against float32 logits of the same rounded inputs."""
    tokens, hidden, vocabulary = (1024, 512, 131_072) if device.type == "cuda" else (64, 32, 4096)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, hidden, generator=generator).to(device, dtype)
    weight = (0.02 * torch.randn(vocabulary, hidden, generator=generator)).to(device, dtype)
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator).to(device)
    labels[:3] = -100
    scale = torch.tensor(1.0 / tokens, device=device)
    gradient = torch.zeros_like(weight, dtype=torch.float32)
    result = loss_and_gradients(
        x,
        weight,
        labels,
        shard=VocabularyShard(0, vocabulary, None),
        scale=scale,
        weight_gradient=gradient,
        chunk_tokens=chunk,
        is_compiled=is_compiled,
    )
    wide_x, wide_weight = x.float().requires_grad_(), weight.float().requires_grad_()
    loss = F.cross_entropy(wide_x @ wide_weight.t(), labels, ignore_index=-100, reduction="sum")
    (loss * scale).backward()
    assert wide_x.grad is not None
    assert wide_weight.grad is not None
    assert relative_difference(result.loss_sum.cpu(), loss.detach().cpu()) < tolerance
    assert relative_difference(result.hidden_gradient.float(), wide_x.grad) < tolerance
    assert relative_difference(gradient, wide_weight.grad) < tolerance
