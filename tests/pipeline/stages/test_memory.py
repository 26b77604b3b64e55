"""Activations of a rank, against what autograd keeps in a whole micro-batch."""

import pytest
import torch

from benchmarks.saved_tensors import SavedTensorMeter
from model.backward import sequential_backward
from model.config import ModelConfig
from model.language_model import MultiTokenModel
from model.layers import Checkpointing
from model.structure.part import ModelPart
from model.structure.process_groups import ensure_single_process
from pipeline.stages.memory import MicroBatch, loss_bytes, stage_activation_bytes
from pipeline.stages.plan import balanced_plan

CONFIG = ModelConfig(
    layers=8,
    hidden_size=64,
    attention_heads=4,
    kv_heads=2,
    ffn_hidden_size=192,
    vocab_size=64,
    future_tokens=2,
)
LENGTH, BATCH = 64, 2


def _peak(checkpointing: Checkpointing, *, freeze: bool) -> int:
    """Most bytes alive for backward in a step of the whole model."""
    ensure_single_process()
    model = MultiTokenModel(CONFIG, activation_checkpointing=checkpointing)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    if freeze:
        model.trunk.requires_grad_(False)
    tokens = torch.randint(0, CONFIG.vocab_size, (BATCH, LENGTH))
    labels = torch.randint(0, CONFIG.vocab_size, (2, BATCH, LENGTH))
    shared = [*model.parameters(), *model.context(LENGTH, tokens.device).rotary]
    with SavedTensorMeter(excluded=shared) as meter:
        result = sequential_backward(
            model, model(tokens), labels, torch.ones(2), chunk_tokens=LENGTH
        )
        result.surrogate_loss.backward()
    return meter.peak


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
@pytest.mark.parametrize("freeze", [False, True])
def test_formula_is_near_what_autograd_keeps(checkpointing: Checkpointing, freeze: bool) -> None:
    """Within 10 %; the formula also has gradients, which autograd passes on and does not keep."""
    micro = MicroBatch(LENGTH * BATCH, 1, 4, checkpointing, accumulation=4)
    expected = stage_activation_bytes(
        [ModelPart.whole(CONFIG)], 0, CONFIG, micro, trunk_trained=not freeze
    )
    gradients = 4 * LENGTH * BATCH * CONFIG.hidden_size * 4
    assert _peak(checkpointing, freeze=freeze) == pytest.approx(expected - gradients, rel=0.1)


def test_stages_keep_micro_batches_in_flight() -> None:
    """The first of three depths keeps three; no more than there are."""
    plan = balanced_plan(3, CONFIG)
    for accumulation, in_flight in ((8, (3, 2)), (1, (1, 1))):
        micro = MicroBatch(LENGTH, 1, 2, "none", accumulation)
        kept = [stage_activation_bytes(plan, stage, CONFIG, micro) for stage in range(2)]
        streams = 2 * LENGTH * CONFIG.hidden_size * 2
        layers = [len(part.trunk_layers) for part in plan]
        units = [(k - streams) / (n * f) for k, n, f in zip(kept, layers, in_flight, strict=False)]
        assert units[0] == pytest.approx(units[1])


def test_logits_of_a_chunk() -> None:
    """In bf16 the chunk exists there and in fp32; in fp32 once; never more than the micro-batch."""
    micro = MicroBatch(
        tokens=100, tensor_size=2, element_bytes=2, checkpointing="none", accumulation=1
    )
    assert loss_bytes(CONFIG, micro, 10) == 10 * 32 * 6
    assert loss_bytes(CONFIG, micro._replace(element_bytes=4), 10) == 10 * 32 * 4
    assert loss_bytes(CONFIG, micro, 4096) == 100 * 32 * 6
