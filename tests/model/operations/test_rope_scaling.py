"""Scaled rotary frequencies: those of transformers, bad parameters named, and none by default."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from model.operations.rope_scaling import RopeScaling
from model.operations.rotary import RotaryTable

HEAD_DIM, THETA = 64, 500000.0
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "parameters", [LLAMA3, {"rope_type": "linear", "factor": 4.0}], ids=["llama3", "linear"]
)
def test_frequencies_equal_those_of_transformers(parameters: dict[str, Any]) -> None:
    """All bands of Llama 3.1's own parameters: kept, divided, and in between."""
    config = LlamaConfig(
        hidden_size=2 * HEAD_DIM,
        num_attention_heads=2,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": THETA, **parameters},
    )
    expected = LlamaRotaryEmbedding(config).inv_freq
    table = RotaryTable(HEAD_DIM, THETA, RopeScaling.model_validate(parameters))
    frequencies = table.angles(torch.tensor([1]))[0, 0, 0]
    torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)
    plain = RotaryTable(HEAD_DIM, THETA).angles(torch.tensor([1]))[0, 0, 0]
    ratios = plain / frequencies
    assert float(ratios[-1]) == pytest.approx(parameters["factor"])
    assert (float(ratios[0]) == 1) == (parameters["rope_type"] == "llama3")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_type": "yarn"}, "'linear' or 'llama3'"),
        ({"factor": 0.5}, "greater than or equal to 1"),
        ({"low_freq_factor": None}, "low_freq_factor is missing; rope_type=llama3 needs"),
        ({"high_freq_factor": 1.0}, "low_freq_factor=1.0 must be smaller than high_freq_factor"),
        ({"rope_type": "linear"}, "low_freq_factor has no effect with rope_type=linear"),
        ({"mscale": 1.0}, "Extra inputs are not permitted"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(change: dict[str, Any], words: str) -> None:
    """An unknown kind, a missing, superfluous or senseless parameter is named."""
    with pytest.raises(ValidationError, match=words):
        RopeScaling.model_validate(LLAMA3 | change)
