"""The comparison with plain PyTorch compares the same model, and runs."""

import pytest
import torch

from benchmarks import training
from benchmarks.plain_model import PlainModel
from benchmarks.training import ARMS, TINY, measure
from benchmarks.training_arms import Arm, run_arm
from model.config import ModelConfig
from model.structure.part import ModelPart
from pipeline.planning.parameters import part_parameters


def _plain(arm: Arm) -> PlainModel:
    return PlainModel(
        trunk_layers=TINY.layers - arm.heads,
        future_tokens=arm.heads,
        hidden=TINY.hidden,
        ffn=TINY.ffn,
        vocabulary=TINY.vocabulary,
    )


@pytest.mark.parametrize("heads", [1, 4])
def test_the_plain_model_has_the_same_parameters(heads: int) -> None:
    """As many as this project's model of that configuration."""
    config = ModelConfig(
        layers=TINY.layers,
        hidden_size=TINY.hidden,
        attention_heads=1,
        ffn_hidden_size=TINY.ffn,
        vocab_size=TINY.vocabulary,
        future_tokens=heads,
    )
    ours = part_parameters(ModelPart.whole(config), config)
    plain = sum(weight.numel() for weight in _plain(Arm("plain", heads)).parameters())
    assert plain == ours


def test_the_plain_loop_trains() -> None:
    """It takes a turn, whose time and memory are counted."""
    torch.manual_seed(0)
    turns = run_arm(Arm("plain", 4), TINY, "cpu")
    seconds, peak = next(turns)
    assert seconds > 0
    assert peak >= 0


def test_an_arm_that_does_not_answer_is_ended() -> None:
    """In time, and it is said."""
    name = "plain PyTorch, n = 1"
    assert measure(TINY, "cpu", 1, [name], limit_s=0.01) == ({}, {name: training.TOO_LONG})


@pytest.mark.stress
def test_the_compiled_baseline_is_the_same_model() -> None:
    """Its loss and gradients, up to the roundings of other kernels."""
    torch.manual_seed(0)
    model = _plain(Arm("plain", 4))
    tokens = torch.randint(0, TINY.vocabulary, (2, TINY.sequence))
    labels = torch.randint(0, TINY.vocabulary, (4, 2, TINY.sequence))
    found = []
    for _ in range(2):
        loss = model(tokens, labels)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        found.append((loss, *gradients))
        model.compile_parts()
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.stress
def test_every_arm_runs() -> None:
    """In turns, each in a process of its own."""
    results, failures = measure(TINY, "cpu", 1, list(ARMS))
    assert failures.keys() <= {"transformers.Trainer, n = 1, ZeRO-1"}, failures
    assert results.keys() | failures.keys() == ARMS.keys()
    assert "| Headway, n = 4, ZeRO-1 |" in training.section(results, failures, TINY, "cpu")
