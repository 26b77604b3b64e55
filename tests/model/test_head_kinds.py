"""Every kind of head: data flow, sizes, gradients against plain autograd, and memory."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from benchmarks.saved_tensors import SavedTensorMeter
from model.backward import joint_loss, sequential_backward
from model.config import ModelConfig
from model.language_model import MultiTokenModel
from model.layers import Checkpointing
from model.loss import IGNORED
from model.structure.parameter_shapes import head_of, parameter_shapes
from tests.support.head_variants import VARIANTS
from tests.support.tiny_model import (
    head_logits,
    tiny_config,
    tiny_model,
    tiny_weights,
    training_model,
)

BATCH, SEQUENCE, HEADS, LAYERS = 2, 10, 3, 8

every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def model_of(variant: dict[str, Any], checkpointing: Checkpointing = "none") -> MultiTokenModel:
    """A tiny one."""
    return training_model(checkpointing, heads=HEADS, layers=LAYERS, **variant)


def batch(heads: int = HEADS) -> tuple[Tensor, Tensor]:
    """Tokens, and labels of which one head lacks a few."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 20, (BATCH, SEQUENCE + heads), generator=generator)
    labels = torch.stack([tokens[:, k : k + SEQUENCE] for k in range(1, heads + 1)])
    labels[heads // 2, 0, 3:7] = IGNORED
    return tokens[:, :SEQUENCE].clone(), labels


def scales_of(labels: Tensor) -> Tensor:
    """Unequal head weights over the number of targets."""
    weights = torch.linspace(0.5, 2.0, len(labels), dtype=torch.float64)
    return weights / (labels != IGNORED).sum((1, 2)).clamp(min=1)


def gradients_of(model: MultiTokenModel) -> dict[str, Tensor]:
    """Of all parameters that have one."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def reference_logits(model: MultiTokenModel, tokens: Tensor) -> list[Tensor]:
    """Whole logits `[S, B, V]` of each head, by the formulas of appendix B, written out."""
    kind, config = model.config.head_kind, model.config
    z = model(tokens)
    context = model.context(SEQUENCE, tokens.device)
    weights = dict(model.named_parameters())

    def head(number: int, hidden: Tensor) -> Tensor:
        if kind == "linear":
            return F.linear(hidden, weights[f"heads.layers.{number}.projection.weight"])
        module = model.heads.layers[str(number)]
        for layer in [module] if config.head_layers == 1 else module.children():
            hidden = layer(hidden, context)
        return hidden

    hidden = {}
    if kind == "causal":
        hidden[1] = head(1, z)
        for number in range(2, HEADS + 1):
            hidden[number] = head(number, hidden[number - 1])
    elif kind == "anticausal":
        hidden[HEADS] = head(HEADS, z)
        for number in range(HEADS - 1, 0, -1):
            hidden[number] = head(number, hidden[number + 1])
    else:
        hidden = {number: head(number, z) for number in range(1, HEADS + 1)}
    logits = []
    for number in range(1, HEADS + 1):
        unembedding = weights["heads.readout.weight"]
        if config.lm_head == "replicated" and number > 1:
            unembedding = weights[f"heads.readouts.{number}.unembedding.weight"]
        norm = weights["heads.readout.norm_weight"]
        logits.append(F.rms_norm(hidden[number], norm.shape, norm, 1e-5) @ unembedding.t())
    return logits


def reference_gradients(variant: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss sums and gradients by plain autograd over whole logits."""
    model = model_of(variant)
    tokens, labels = batch()
    losses = [
        F.cross_entropy(logits.permute(1, 2, 0), target, reduction="sum")
        for logits, target in zip(reference_logits(model, tokens), labels, strict=True)
    ]
    total = torch.stack(losses)
    (total * scales_of(labels)).sum().backward()
    return total.detach(), gradients_of(model)


@every_variant
@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
@pytest.mark.parametrize("backward", [sequential_backward, joint_loss])
def test_gradients_are_those_of_plain_autograd(
    variant: dict[str, Any], checkpointing: Checkpointing, backward: Any
) -> None:
    """Of every parameter, in float64; each gets some."""
    expected_sums, expected = reference_gradients(variant)
    model = model_of(variant, checkpointing)
    tokens, labels = batch()
    result = backward(model, model(tokens), labels, scales_of(labels), chunk_tokens=7)
    result.surrogate_loss.backward()
    torch.testing.assert_close(result.loss_sums, expected_sums, rtol=0, atol=1e-11)
    found = gradients_of(model)
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, wanted in expected.items():
        assert float(wanted.abs().max()) > 1e-6, name  # a zero would prove nothing
        assert float((found[name] - wanted).abs().max()) < 1e-11, name


@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS.values() if v.get("head_kind") != "anticausal"]
)
def test_heads_alone_learn_on_a_frozen_model(variant: dict[str, Any]) -> None:
    """What `train.freeze=trunk` leaves to train gets the gradients it gets beside all else.

    Of anticausal heads nothing is left: the next token passes them all.
    """
    _, expected = reference_gradients(variant)
    model = model_of(variant)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(head_of(name) > 1)
    tokens, labels = batch()
    result = sequential_backward(model, model(tokens), labels, scales_of(labels), chunk_tokens=7)
    result.surrogate_loss.backward()
    found = gradients_of(model)
    assert found.keys() == {name for name in expected if head_of(name) > 1}
    for name, gradient in found.items():
        assert float((gradient - expected[name]).abs().max()) < 1e-11, name


# Which heads' logits change with the weights of head 2 of 3.
READERS = {"parallel": {2}, "linear": {2}, "causal": {2, 3}, "anticausal": {1, 2}}


@every_variant
def test_a_head_is_read_by_those_after_it(variant: dict[str, Any]) -> None:
    """The data flow of each kind."""
    config = tiny_config(layers=LAYERS, future_tokens=HEADS, **variant)
    weights = tiny_weights(config)
    tokens = batch()[0]
    before = head_logits(tiny_model(config, weights), tokens)
    for name in weights:
        if name.startswith("heads.layers.2."):
            weights[name] = weights[name] + 0.05
    changed = (head_logits(tiny_model(config, weights), tokens) - before).abs().amax((1, 2, 3))
    assert {k + 1 for k in range(HEADS) if changed[k] > 1e-6} == READERS[config.head_kind]


@every_variant
def test_no_head_sees_the_future(variant: dict[str, Any]) -> None:
    """Another token at position 6 changes no logits before it."""
    model = tiny_model(tiny_config(layers=LAYERS, future_tokens=HEADS, **variant))
    tokens = batch()[0]
    other = tokens.clone()
    other[:, 6] = (other[:, 6] + 1) % 20
    before, after = head_logits(model, tokens), head_logits(model, other)
    assert torch.equal(before[:, :, :6], after[:, :, :6])
    assert not torch.equal(before[:, :, 6:], after[:, :, 6:])


@every_variant
def test_count_is_that_of_the_parameters(variant: dict[str, Any]) -> None:
    """The formula, the shapes and the model agree, in the same order."""
    config = tiny_config(layers=LAYERS, future_tokens=HEADS, **variant)
    shapes = parameter_shapes(config)
    model = model_of(variant)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == shapes
    assert list(dict(model.named_parameters())) == list(shapes)
    assert config.num_parameters() == sum(torch.Size(shape).numel() for shape in shapes.values())


def test_size_depends_on_the_kind_as_documented() -> None:
    """Equal for kinds made of layers, whatever n.

    Linear heads come on top, and so do the further unembeddings of a replicated LM head.
    """

    def size(heads: int, **variant: Any) -> int:
        return tiny_config(layers=LAYERS, future_tokens=heads, **variant).num_parameters()

    plain = size(1)
    assert {size(n, head_kind=kind) for n in (2, 5) for kind in ("parallel", "causal")} == {plain}
    assert size(3, head_kind="anticausal", head_layers=2) == plain
    assert size(3, head_kind="linear") == plain + 3 * 32 * 32
    assert size(3, lm_head="replicated") == plain + 2 * 20 * 32


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"layers": 6, "future_tokens": 3, "head_layers": 2}, "model.layers to at least 7"),
        ({"layers": 6, "future_tokens": 6}, "use 1 to 5 heads"),
        ({"head_kind": "linear", "head_layers": 2}, "leave it at 1"),
        ({"head_kind": "serial"}, "'parallel', 'causal', 'anticausal' or 'linear'"),
        ({"lm_head": "own"}, "'shared' or 'replicated'"),
    ],
)
def test_impossible_heads_are_refused(sizes: dict[str, Any], message: str) -> None:
    """With what is possible."""
    with pytest.raises(ValidationError) as error:
        tiny_config(**sizes)
    assert message in str(error.value)


def test_linear_heads_leave_all_layers_to_the_trunk() -> None:
    """There may be more of them than layers."""
    config = tiny_config(layers=2, future_tokens=4, head_kind="linear")
    assert (config.trunk_layers, config.layers_per_head) == (2, 0)


def flops_of_matrices(config: ModelConfig) -> float:
    """Six for every element of a matrix that a token is multiplied with."""
    return 6.0 * sum(
        torch.Size(shape).numel() * (config.future_tokens if name == "heads.readout.weight" else 1)
        for name, shape in parameter_shapes(config).items()
        if len(shape) == 2 and name != "trunk.embedding.weight"
    )


@every_variant
def test_flops_are_counted_for_every_matrix(variant: dict[str, Any]) -> None:
    """And attention for every layer."""
    config = tiny_config(layers=LAYERS, future_tokens=HEADS, **variant)
    wanted = flops_of_matrices(config)
    if config.lm_head == "replicated":  # there the matrix of head 1 is one of n
        wanted -= 6 * (HEADS - 1) * 20 * 32
    attention = 6 * LAYERS * 32 * 64
    assert config.flops_per_token(64) == pytest.approx(wanted + attention, rel=1e-12)


def peak_saved_bytes(backward: Any, heads: int, variant: dict[str, Any]) -> int:
    """Most bytes alive for backward during a step of a model with one trunk layer."""
    linear = variant.get("head_kind") == "linear"
    layers = 1 if linear else 1 + heads * variant.get("head_layers", 1)
    model = training_model(heads=heads, layers=layers, **variant)
    tokens, labels = batch(heads)
    with SavedTensorMeter(excluded=model.parameters()) as meter:
        result = backward(model, model(tokens), labels, scales_of(labels), chunk_tokens=7)
        result.surrogate_loss.backward()
    assert meter.alive == 0
    return meter.peak


@every_variant
def test_memory_does_not_depend_on_the_number_of_heads(variant: dict[str, Any]) -> None:
    """With the same trunk, the bytes saved for backward are equal for any number of heads.

    The joint loss keeps every head's.
    """
    heads = (1, 2, 4, 8)
    sequential = [peak_saved_bytes(sequential_backward, n, variant) for n in heads]
    assert sequential == [sequential[0]] * len(heads)
    joint = [peak_saved_bytes(joint_loss, n, variant) for n in heads]
    assert joint[3] - joint[2] > 1.9 * (joint[2] - joint[1]) > 0
