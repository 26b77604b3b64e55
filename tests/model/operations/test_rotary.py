"""Rotary positions: those of transformers' Llama, and queries and keys turned by them."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama

from model.operations.rotary import RotaryTable

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
    rotation = RotaryTable(HEAD_DIM, theta).sequence(4096, torch.device("cpu"), torch.float32)
    for ours, theirs in zip(rotation, (cos, sin), strict=True):
        assert ours.shape == (4096, 1, 1, HEAD_DIM // 2)
        twice = torch.cat((ours, ours), dim=-1)[:, 0, 0]  # Llama keeps both halves, which are alike
        torch.testing.assert_close(twice, theirs[0], rtol=0, atol=TOLERANCE)


def test_positions_of_each_row() -> None:
    """[B, S] positions give each sequence its own angles, those of the sequence table."""
    table = RotaryTable(HEAD_DIM, 10000.0)
    positions = torch.tensor([[3, 4, 5], [17, 18, 19]])
    rotation = table.rotation(positions, torch.float32)
    sequence = table.sequence(20, torch.device("cpu"), torch.float32)
    for found, expected in zip(rotation, sequence, strict=True):
        assert found.shape == (3, 2, 1, HEAD_DIM // 2)
        for index in range(2):
            assert torch.equal(found[:, index, 0], expected[positions[index], 0, 0])


def test_the_table_is_not_cast_with_the_weights() -> None:
    """Angles stay float32 in a bf16 run, where positions past 256 would fall together.

    Cosines and sines are rounded once, from those of the float32 angles.
    """
    table = RotaryTable(HEAD_DIM, 10000.0)
    angles = table.angles(torch.arange(1000))
    assert angles.dtype == torch.float32
    assert len(angles[:, 0, 0, 0].unique()) == 1000
    rounded = table.sequence(1000, torch.device("cpu"), torch.bfloat16)
    assert torch.equal(rounded.cos, angles.cos().bfloat16())
    assert torch.equal(rounded.sin, angles.sin().bfloat16())


def test_cosines_are_made_once_for_a_length() -> None:
    """The second forward of this length and dtype takes the first one's."""
    table, cpu = RotaryTable(HEAD_DIM, 10000.0), torch.device("cpu")
    first = table.sequence(9, cpu, torch.float32)
    assert table.sequence(9, cpu, torch.float32) is first
    assert table.sequence(9, cpu, torch.bfloat16) is not first
    assert table.sequence(8, cpu, torch.float32) is not first
