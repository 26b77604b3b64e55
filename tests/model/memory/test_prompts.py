"""The prompt that is made of memories, and what a memory adds to a model."""

import math

import pytest
import torch

from model.config import ModelConfig
from model.memory.prompts import MemoryParameters, MemoryWeights, recall, retrieve
from model.memory.sizes import MemorySizes
from model.structure.parameter_shapes import parameter_shapes
from tests.support.tiny_model import tiny_config

HIDDEN, WIDTH, ROWS = 6, 4, 3


def _weights(scale: float = 1.0) -> MemoryWeights:
    generator = torch.Generator().manual_seed(3)
    shapes = ((1, HIDDEN), (1, HIDDEN), (WIDTH, HIDDEN), (WIDTH, HIDDEN))
    return MemoryWeights(*(scale * torch.randn(shape, generator=generator) for shape in shapes))


def _case(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return (
        torch.randn(ROWS, HIDDEN, generator=generator),
        torch.randn(count, ROWS, HIDDEN, generator=generator),
    )


def test_h2_the_prompt_is_a_mean_of_memories() -> None:
    """Shares are not negative and add up to 1, each row's own; one memory is handed on as it is."""
    summary, memories = _case(5)
    shares = recall(_weights(), summary, memories)
    assert shares.shape == (5, ROWS)
    assert bool((shares >= 0).all())
    torch.testing.assert_close(shares.sum(0), torch.ones(ROWS))
    expected = (shares.unsqueeze(-1) * memories).sum(0)
    torch.testing.assert_close(retrieve(_weights(), summary, memories), expected)
    assert torch.equal(retrieve(_weights(), summary, memories[:1]), memories[0])


def test_h3_without_a_query_all_memories_count_alike() -> None:
    """W_q = 0 gives their mean."""
    summary, memories = _case(4)
    weights = _weights()._replace(query=torch.zeros(WIDTH, HIDDEN))
    torch.testing.assert_close(retrieve(weights, summary, memories), memories.mean(0))


def test_scores_are_divided_by_the_root_of_the_width() -> None:
    """Two memories, whose scores can be counted by hand."""
    query, key = torch.zeros(4, 2), torch.zeros(4, 2)
    query[:, 0], key[:, 1] = 1.0, 1.0
    weights = MemoryWeights(torch.zeros(1, 2), torch.zeros(1, 2), query, key)
    memories = torch.tensor([[[0.0, 3.0]], [[0.0, 1.0]]])
    shares = recall(weights, torch.tensor([[1.0, 0.0]]), memories)
    expected = torch.tensor([4 * 3.0, 4 * 1.0]).div(math.sqrt(4)).softmax(0)
    torch.testing.assert_close(shares[:, 0], expected)


def test_shares_are_computed_in_float32() -> None:
    """In bf16, too, where the sum of many shares would lose digits."""
    weights = MemoryWeights(*(part.bfloat16() for part in _weights() if part is not None))
    summary, memories = _case(50)
    assert recall(weights, summary.bfloat16(), memories.bfloat16()).dtype == torch.float32


def test_rows_see_their_own_memories_only() -> None:
    """Hidden ones get no share; a row without any has the initial memory, and finite gradients."""
    summary, memories = _case(3)
    hidden = torch.tensor([[True, False, True], [False, False, True], [True, False, True]])
    weights = MemoryWeights(*(part.requires_grad_() for part in _weights() if part is not None))
    prompt = retrieve(weights, summary, memories, hidden)
    assert torch.equal(prompt[0], memories[1, 0])
    torch.testing.assert_close(prompt[1], retrieve(weights, summary, memories)[1])
    assert torch.equal(prompt[2], weights.initial[0])
    prompt.sum().backward()
    for part in (weights.initial, weights.query, weights.key):
        assert part is not None
        assert part.grad is not None
        assert bool(part.grad.isfinite().all())


@pytest.mark.parametrize(("retrieval", "width"), [(True, None), (True, 16), (False, None)])
def test_h4_added_parameters(retrieval: bool, width: int | None) -> None:
    """2 d d_h + 2 d, or d alone, in the formula, the shapes and the module alike."""
    memory = {"segment": 8, "retrieval": retrieval, "width": width}
    config, plain = tiny_config(memory=memory), tiny_config()
    expected = 2 * 32 * (width or 32) + 2 * 32 if retrieval else 32
    assert config.num_parameters() - plain.num_parameters() == expected
    assert config.parameter_count().memory == expected
    shapes = parameter_shapes(config)
    assert (
        sum(math.prod(shapes[name]) for name in shapes.keys() - parameter_shapes(plain)) == expected
    )
    assert config.memory is not None
    module = MemoryParameters(config.memory, 32, torch.float32)
    assert sum(parameter.numel() for parameter in module.parameters()) == expected


def test_h4_a_model_of_7_billion_gets_half_a_percent() -> None:
    """33.5 million, as published."""
    config = ModelConfig(
        layers=32,
        hidden_size=4096,
        attention_heads=32,
        ffn_hidden_size=11008,
        vocab_size=32000,
        future_tokens=1,
        memory=MemorySizes(segment=512),
    )
    count = config.parameter_count()
    assert count.memory == 2 * 4096 * 4096 + 2 * 4096
    assert 0.0049 < count.memory / (count.total - count.memory) < 0.0051
