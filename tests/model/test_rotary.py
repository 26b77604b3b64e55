"""Rotary angles: those of transformers' Llama, in the form megatron's attention takes."""

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama

from model.layers import transformer_config
from model.process_groups import ensure_single_process
from model.rotary import RotaryTable
from tests.support.tiny_model import tiny_config

HEAD_DIM = 8
# Angles are float32: near position 4000 they are rounded to 2^-12.
TOLERANCE = 2**-12


def llama_rotary(theta: float) -> modeling_llama.LlamaRotaryEmbedding:
    """The rotary embedding of transformers' Llama."""
    config = LlamaConfig(
        hidden_size=2 * HEAD_DIM,
        num_attention_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    return modeling_llama.LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_angles_equal_those_of_transformers(theta: float) -> None:
    """Cosines and sines agree for positions 0 .. 4095."""
    positions = torch.arange(4096).unsqueeze(0)
    cos, sin = llama_rotary(theta)(torch.zeros(1), positions)
    angles = RotaryTable(HEAD_DIM, theta).sequence(4096, torch.device("cpu"))
    assert angles.shape == (4096, 1, 1, HEAD_DIM)
    torch.testing.assert_close(angles.cos()[:, 0, 0], cos[0], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(angles.sin()[:, 0, 0], sin[0], rtol=0, atol=TOLERANCE)


def test_megatron_rotates_with_them_as_llama_does() -> None:
    """The rotated queries are those of transformers: the convention of halves is the same."""
    ensure_single_process()
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(50, 2, 3, HEAD_DIM, generator=generator)  # [S, B, A, D]
    angles = RotaryTable(HEAD_DIM, 10000.0).angles(torch.arange(50))
    ours = apply_rotary_pos_emb(query, angles, transformer_config(tiny_config()))
    cos, sin = llama_rotary(10000.0)(query, torch.arange(50).unsqueeze(0))
    by_head = query.permute(1, 2, 0, 3)
    theirs, _ = modeling_llama.apply_rotary_pos_emb(by_head, by_head, cos, sin)
    torch.testing.assert_close(ours.permute(1, 2, 0, 3), theirs, rtol=0, atol=1e-5)


def test_positions_of_each_row() -> None:
    """[B, S] positions give each sequence its own angles, those of the sequence table."""
    table = RotaryTable(HEAD_DIM, 10000.0)
    positions = torch.tensor([[3, 4, 5], [17, 18, 19]])
    angles = table.angles(positions)
    assert angles.shape == (3, 2, 1, HEAD_DIM)
    sequence = table.sequence(20, torch.device("cpu"))[:, 0, 0]
    for index in range(2):
        assert torch.equal(angles[:, index, 0], sequence[positions[index]])


def test_the_table_is_not_cast_with_the_weights() -> None:
    """Angles stay float32 in a bf16 run, where positions past 256 would fall together."""
    angles = RotaryTable(HEAD_DIM, 10000.0).sequence(1000, torch.device("cpu"))
    assert angles.dtype == torch.float32
    assert len(angles[:, 0, 0, 0].unique()) == 1000
