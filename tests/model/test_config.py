"""Model sizes: rules, derived values, parameter and FLOP formulas."""

from typing import Any

import pytest
from pydantic import ValidationError

from model.config import ModelConfig
from tests.support.hostile import limits

SIZES: dict[str, Any] = {
    "layers": 8,
    "hidden_size": 64,
    "attention_heads": 4,
    "vocab_size": 96,
    "future_tokens": 4,
}


def problems(**changes: Any) -> list[str]:
    """The lines a configuration with these changes is refused with."""
    with pytest.raises(ValidationError) as caught:
        ModelConfig(**{**SIZES, **changes})
    return [
        line
        for fault in caught.value.errors()
        if fault["type"] == "value_error"
        for line in str(fault["ctx"]["error"]).splitlines()
    ]


def test_sizes_left_out_follow_from_the_others() -> None:
    """kv_heads is attention_heads; the feed-forward width is 8/3 H up to a multiple of 256."""
    config = ModelConfig(**SIZES)
    assert (config.kv_heads, config.head_dim, config.trunk_layers) == (4, 16, 4)
    assert config.loss_weights(0) == (1.0, 1.0, 1.0, 1.0)
    widths = {64: 256, 96: 256, 1024: 2816, 4096: 11008, 5120: 13824}
    found = {
        hidden: ModelConfig(**{**SIZES, "hidden_size": hidden}).ffn_hidden_size for hidden in widths
    }
    assert found == widths


def test_config_is_frozen() -> None:
    """A value cannot be changed after it was read."""
    config = ModelConfig(**SIZES)
    with pytest.raises(ValidationError, match="frozen"):
        config.layers = 9  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"future_tokens": 8}, ["future_tokens=8", "layers=8", "at least 9", "1 to 7 heads"]),
        ({"attention_heads": 5}, ["hidden_size=64", "attention_heads=5", "60 or 70"]),
        ({"hidden_size": 12}, ["odd width 3", "nearest: 8 or 16"]),
        ({"kv_heads": 3}, ["kv_heads=3", "attention_heads=4", "nearest: 2 or 4"]),
        ({"head_weights": [1.0]}, ["1 values", "future_tokens=4", "null"]),
        ({"head_weights": [1, 1, 1, -1]}, ["negative"]),
        ({"head_weights": [0, 0, 0, 0]}, ["above 0"]),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], parts: list[str]) -> None:
    """A refusal is one line with the value, the rule and what to do."""
    lines = problems(**changes)
    assert len(lines) == 1
    assert all(part in lines[0] for part in parts), lines[0]


def test_all_problems_of_the_sizes_are_reported_together() -> None:
    """Two broken rules give two lines."""
    assert len(problems(future_tokens=9, attention_heads=5)) == 2


@pytest.mark.parametrize("value", [0, -4, True, "4", 4.0])
def test_sizes_are_positive_whole_numbers(value: object) -> None:
    """Neither zero, negative, boolean, text nor decimal passes for a size."""
    with pytest.raises(ValidationError):
        ModelConfig(**{**SIZES, "layers": value})


def test_parameter_count_against_a_sum_over_every_matrix() -> None:
    """The formula equals the sum over all matrices of a small model, listed one by one."""
    config = ModelConfig(**{**SIZES, "kv_heads": 2, "ffn_hidden_size": 100})
    per_layer = sum(
        [
            64 * 64,  # queries
            64 * 32,  # keys
            64 * 32,  # values
            64 * 64,  # projection
            64 * 100,  # gate
            64 * 100,  # up
            100 * 64,  # down
            64 + 64,  # norms
        ]
    )
    count = config.parameter_count()
    assert count.trunk_layers == 4 * per_layer
    assert count.head_layers == 4 * per_layer
    assert config.num_parameters() == count.total == 8 * per_layer + 2 * 96 * 64 + 64


def test_parameter_count_does_not_depend_on_the_number_of_heads() -> None:
    """Each head takes the place of a trunk layer."""
    counts = {ModelConfig(**{**SIZES, "future_tokens": n}).num_parameters() for n in range(1, 8)}
    assert len(counts) == 1


def test_seven_billion_model_has_the_published_size() -> None:
    """The 7B row has 6.7 billion parameters."""
    config = ModelConfig(
        layers=32, hidden_size=4096, attention_heads=32, vocab_size=32000, future_tokens=4
    )
    assert config.num_parameters() == 6_738_415_616


def test_flops_count_the_unembedding_once_per_head() -> None:
    """Another head costs one more unembedding product, and twice the context more attention."""
    one, two = (ModelConfig(**{**SIZES, "future_tokens": n}) for n in (1, 2))
    assert two.flops_per_token(128) - one.flops_per_token(128) == 6 * 96 * 64
    attention = one.flops_per_token(256) - one.flops_per_token(128)
    assert attention == 6 * 8 * 64 * 128
    matrices = one.num_parameters() - 96 * 64 - 64 - 8 * 2 * 64
    assert one.flops_per_token(128) == 6 * matrices + 6 * 8 * 64 * 128


def test_flops_of_a_frozen_model_are_mostly_forwards() -> None:
    """All forwards, the whole backward of 2 heads' layers, half of that of their unembeddings."""
    model = ModelConfig(**{**SIZES, "future_tokens": 3})
    layer = (model.flops_per_token(128) - 6 * 3 * 96 * 64) / 6 / 8  # with its attention
    expected = 2 * (8 * layer + 3 * 96 * 64) + 2 * 4 * layer + 2 * 2 * 96 * 64
    assert model.flops_per_token(128, trained_heads=2) == pytest.approx(expected, rel=1e-12)


def test_tensor_parallel_sizes_are_checked_with_nearest_values() -> None:
    """Each size that cannot be divided is named with its nearest workable values."""
    config = ModelConfig(
        **{**SIZES, "attention_heads": 8, "kv_heads": 2, "ffn_hidden_size": 250, "vocab_size": 98}
    )
    assert config.check_tensor_parallel(2) == []
    assert config.check_tensor_parallel(4) == [
        "kv_heads=2 is not divisible by the tensor-parallel size 4; nearest: 4",
        "ffn_hidden_size=250 is not divisible by the tensor-parallel size 4; nearest: 248 or 252",
        "vocab_size=98 is not divisible by the tensor-parallel size 4; nearest: 100",
    ]
    assert config.tensor_parallel_sizes == [1, 2]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("layers", 1025), ("future_tokens", 1 << 40), ("hidden_size", (1 << 20) + 64)),
        *(("attention_heads", 1 << 62), ("vocab_size", 1 << 25), ("ffn_hidden_size", 10**400)),
    ],
)
def test_sizes_of_no_model_are_refused(key: str, value: int) -> None:
    """Before anything is computed from them that would take time or memory."""
    with limits(2), pytest.raises(ValidationError, match="less than or equal to"):
        ModelConfig(**{**SIZES, key: value})


def test_the_largest_sizes_are_checked_at_once() -> None:
    """Divisors and nearest multiples of the largest sizes that are taken."""
    config = ModelConfig(
        layers=1024,
        hidden_size=1 << 20,
        attention_heads=1 << 10,
        vocab_size=1 << 24,
        future_tokens=1000,
    )
    with limits(5):
        assert config.tensor_parallel_sizes[-1] == 256  # of the feed-forward width
        assert len(config.check_tensor_parallel(7)) == 4
        assert config.check_tensor_parallel(1 << 62)
