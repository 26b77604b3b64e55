"""Sequential-head backward: the gradients of the joint loss, at the memory of one head."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.saved_tensors import SavedTensorMeter
from model.backward import MicroBatchResult, joint_loss, sequential_backward
from model.language_model import MultiTokenModel
from model.layers import Checkpointing
from model.loss import IGNORED
from tests.support.tiny_model import tiny_config, training_model

BATCH, SEQUENCE, HEADS = 2, 10, 3
Backward = Callable[..., MicroBatchResult]


def make_batch(heads: int = HEADS) -> tuple[Tensor, Tensor]:
    """Tokens, and labels of which head 2 lacks a few."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(
        0, tiny_config().vocab_size, (BATCH, SEQUENCE + heads), generator=generator
    )
    labels = torch.stack([tokens[:, k : k + SEQUENCE] for k in range(1, heads + 1)])
    labels[heads // 2, 0, 3:7] = IGNORED
    return tokens[:, :SEQUENCE].clone(), labels


def run(
    model: MultiTokenModel, backward: Backward, labels: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """One micro-batch with unequal head weights; loss sums and every parameter's gradient."""
    tokens, all_labels = make_batch(len(model.heads.numbers))
    labels = all_labels if labels is None else labels
    weights = torch.linspace(0.5, 2.0, len(labels), dtype=torch.float64)
    scales = weights / (labels != IGNORED).sum((1, 2)).clamp(min=1)
    model.zero_grad()
    result = backward(model, model(tokens), labels, scales, chunk_tokens=7)
    result.surrogate_loss.backward()
    return result.loss_sums, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_sequential_gives_the_joint_gradients(checkpointing: Checkpointing) -> None:
    """Within 1e-12 in float64, for every parameter, with head weights and ignored labels."""
    model = training_model(checkpointing)
    losses, gradients = run(model, sequential_backward)
    plain = training_model()
    expected_losses, expected = run(plain, joint_loss)
    torch.testing.assert_close(losses, expected_losses, rtol=0, atol=1e-12)
    assert gradients.keys() == expected.keys()
    for name, wanted in expected.items():
        found = gradients[name]
        assert found is not None, name
        assert wanted is not None, name
        assert float(wanted.abs().max()) > 1e-6, name  # a zero would prove nothing
        assert float((found - wanted).abs().max()) < 1e-12, name


def test_joint_gradients_are_those_of_plain_autograd() -> None:
    """The reference itself: whole logits, torch's cross-entropy, the weighted sum over heads."""
    model = training_model()
    losses, gradients = run(model, joint_loss)
    tokens, labels = make_batch()
    model.zero_grad()
    trunk_output = model(tokens)
    norm, unembedding = model.heads.lm_head()
    context = model.context(SEQUENCE, tokens.device)
    sums = []
    for head in model.heads.numbers:
        hidden = model.heads.hidden(head, trunk_output, context)
        hidden = model.heads.lm_head.normalize(hidden, norm)
        logits = (hidden @ unembedding.t()).permute(1, 2, 0)  # [B, V, S]
        sums.append(torch.nn.functional.cross_entropy(logits, labels[head - 1], reduction="sum"))
    total = torch.stack(sums)
    weights = torch.linspace(0.5, 2.0, HEADS, dtype=torch.float64)
    (total * weights / (labels != IGNORED).sum((1, 2))).sum().backward()
    torch.testing.assert_close(losses, total.detach(), rtol=0, atol=1e-12)
    for name, parameter in model.named_parameters():
        found = gradients[name]
        assert found is not None
        assert parameter.grad is not None
        assert float((found - parameter.grad).abs().max()) < 1e-12, name


def test_two_micro_batches_add_up() -> None:
    """Gradients accumulate over micro-batches: twice the same one is twice the gradient."""
    model = training_model()
    _, once = run(model, sequential_backward)
    doubled = {name: 2 * gradient for name, gradient in once.items() if gradient is not None}
    tokens, labels = make_batch()
    scales = torch.linspace(0.5, 2.0, HEADS, dtype=torch.float64)
    scales = scales / (labels != IGNORED).sum((1, 2))
    sequential_backward(
        model, model(tokens), labels, scales, chunk_tokens=7
    ).surrogate_loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, doubled[name], rtol=0, atol=1e-12)


def test_head_without_targets_gets_zero_gradients() -> None:
    """Its loss is 0 and its layer's gradients are zeros; all others are not."""
    model = training_model()
    labels = make_batch()[1]
    labels[1] = IGNORED
    losses, gradients = run(model, sequential_backward, labels)
    assert float(losses[1]) == 0.0
    for name, gradient in gradients.items():
        assert gradient is not None
        assert bool(gradient.isfinite().all())
        assert bool((gradient == 0).all()) == name.startswith("heads.layers.2."), name


@pytest.mark.parametrize("backward", [sequential_backward, joint_loss])
@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_frozen_trunk_still_trains_the_heads(
    backward: Backward, checkpointing: Checkpointing
) -> None:
    """Heads and LM head get the gradients they get beside a trained trunk; the trunk gets none."""
    _, expected = run(training_model(), sequential_backward)
    model = training_model(checkpointing)
    model.trunk.requires_grad_(False)
    _, gradients = run(model, backward)
    for name, gradient in gradients.items():
        if name.startswith("trunk."):
            assert gradient is None
        else:
            assert gradient is not None, name
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-12)


def test_head_layers_train_when_all_else_is_frozen() -> None:
    """The surrogate loss has no gradient left to deliver, and its backward still runs."""
    _, expected = run(training_model(), sequential_backward)
    model = training_model()
    model.trunk.requires_grad_(False)
    model.heads.lm_head.requires_grad_(False)
    _, gradients = run(model, sequential_backward)
    for name, gradient in gradients.items():
        if name.startswith("heads.layers."):
            assert gradient is not None, name
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-12)
        else:
            assert gradient is None


def peak_saved_bytes(backward: Backward, heads: int, checkpointing: Checkpointing) -> int:
    """Most bytes alive for backward during a step of a model with one trunk layer."""
    model = training_model(checkpointing, heads=heads, layers=1 + heads)
    with SavedTensorMeter(excluded=model.parameters()) as meter:
        run(model, backward)
    assert meter.alive == 0
    return meter.peak


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_memory_does_not_depend_on_the_number_of_heads(checkpointing: Checkpointing) -> None:
    """With the same trunk, the bytes saved for backward are equal for 1, 2, 4 and 8 heads.

    The joint loss keeps every head's.
    """
    heads = (1, 2, 4, 8)
    sequential = [peak_saved_bytes(sequential_backward, n, checkpointing) for n in heads]
    joint = [peak_saved_bytes(joint_loss, n, checkpointing) for n in heads]
    assert sequential == [sequential[0]] * len(heads)
    growth = [(joint[i] - joint[0]) / (heads[i] - 1) for i in range(1, len(heads))]
    assert max(growth) - min(growth) < 0.01 * growth[0]  # so many bytes for each further head
    assert growth[0] > 0.2 * joint[0]
