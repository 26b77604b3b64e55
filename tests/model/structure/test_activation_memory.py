"""The count of what a layer keeps for backward, against what autograd keeps."""

import pytest
import torch

from benchmarks.saved_tensors import SavedTensorMeter
from model.config import ModelConfig
from model.language_model import MultiTokenModel
from model.layers import Checkpointing
from model.structure.activation_memory import layer_activation_bytes
from model.structure.process_groups import ensure_single_process

LENGTH, BATCH = 48, 2


def kept_by_trunk(config: ModelConfig, dtype: torch.dtype, checkpointing: Checkpointing) -> int:
    """Bytes alive after the trunk's forward, without weights and what all layers share."""
    ensure_single_process()
    model = MultiTokenModel(config, dtype=dtype, activation_checkpointing=checkpointing)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    tokens = torch.randint(0, config.vocab_size, (BATCH, LENGTH))
    shared = [*model.parameters(), *model.context(LENGTH, tokens.device).rotary]
    with SavedTensorMeter(excluded=shared) as meter:
        output = model(tokens)
    alive = meter.alive
    output.sum().backward()
    assert meter.alive == 0
    return alive


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_formula_is_what_autograd_keeps(
    checkpointing: Checkpointing, dtype: torch.dtype, kv_heads: int
) -> None:
    """Within 1 % for each further layer, whatever is recomputed."""
    kept = []
    for trunk_layers in (2, 4):
        config = ModelConfig(
            layers=trunk_layers + 1,
            hidden_size=64,
            attention_heads=4,
            kv_heads=kv_heads,
            ffn_hidden_size=160,
            vocab_size=50,
            future_tokens=1,
        )
        kept.append(kept_by_trunk(config, dtype, checkpointing))
    expected = layer_activation_bytes(
        config,
        tokens=LENGTH * BATCH,
        checkpointing=checkpointing,
        element_bytes=dtype.itemsize,
    )
    assert (kept[1] - kept[0]) / 2 == pytest.approx(expected, rel=0.01)
