"""Initial weights: the same in every layout; slices and what they are slices of."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import parallel_state
from torch import Tensor

from model.config import ModelConfig
from model.language_model import MultiTokenModel
from model.structure.initialization import initial_weight
from model.structure.parameter_shapes import parameter_shapes
from model.structure.process_groups import ensure_single_process
from model.structure.sharding import Placement, global_shape, merge_slices, placement_of, take_slice
from tests.support.harness import run_ranks
from tests.support.tiny_model import tiny_config

STD = 0.02
# Matrices of more than one generator block of 256 rows, whose slices do not end at block borders.
CONFIG = tiny_config(
    layers=3, future_tokens=2, kv_heads=4, hidden_size=48, ffn_hidden_size=600, vocab_size=1064
)
SHAPES = parameter_shapes(CONFIG)


def rank_part(name: str, rank: int, size: int, seed: int = 1) -> Tensor:
    """What rank `rank` of `size` tensor-parallel ranks starts with."""
    shape, placement = list(SHAPES[name]), placement_of(name)
    if placement.dim is not None:
        shape[placement.dim] //= size
    return initial_weight(
        name,
        torch.Size(shape),
        seed=seed,
        std=STD,
        num_layers=CONFIG.layers,
        tensor_rank=rank,
        tensor_size=size,
    )


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("size", [2, 4])
def test_merged_parts_are_the_whole_bit_for_bit(name: str, size: int) -> None:
    """2 or 4 tensor-parallel ranks start from the very model of one process."""
    whole = rank_part(name, 0, 1)
    assert whole.shape == SHAPES[name]
    parts = [rank_part(name, rank, size) for rank in range(size)]
    assert torch.equal(merge_slices(parts, placement_of(name)), whole)


def test_weights_depend_on_name_and_seed() -> None:
    """Equal calls give equal weights; another layer, another matrix or another seed other ones."""
    first, second = (f"trunk.layers.0.block.mlp.linear_fc{i}.weight" for i in (1, 2))
    assert torch.equal(rank_part(first, 0, 1), rank_part(first, 0, 1))
    head = first.replace("trunk.layers.0", "heads.layers.1")
    others = [rank_part(head, 0, 1), rank_part(first, 0, 1, seed=2), rank_part(second, 0, 1)]
    sample = rank_part(first, 0, 1).flatten()[:1000]
    for other in others:
        correlation = torch.corrcoef(torch.stack((sample, other.flatten()[:1000])))[0, 1]
        assert abs(float(correlation)) < 0.2  # 1000 independent pairs: 0.03 on average


def test_blocks_of_rows_are_independent() -> None:
    """The generator blocks within one matrix do not repeat each other."""
    blocks = rank_part("trunk.embedding.weight", 0, 1)[:1024].view(4, -1)
    correlations = torch.corrcoef(blocks) - torch.eye(4)
    assert float(correlations.abs().max()) < 0.05  # 12288 independent pairs: 0.009 on average


def test_statistics() -> None:
    """Mean 0; `std`, or `std / sqrt(2 L)` where a layer writes to the residual stream; norms 1."""
    for name in SHAPES:
        weight = rank_part(name, 0, 1)
        if weight.dim() == 1:
            assert torch.equal(weight, torch.ones_like(weight))
            continue
        residual = "linear_proj" in name or "linear_fc2" in name
        std = STD / math.sqrt(2 * CONFIG.layers) if residual else STD
        count = weight.numel()
        # Five standard errors of the mean and of the standard deviation.
        assert abs(float(weight.mean())) < 5 * std / math.sqrt(count), name
        assert abs(float(weight.std()) / std - 1) < 5 / math.sqrt(2 * count), name


@st.composite
def whole_and_layout(draw: st.DrawFn) -> tuple[Tensor, Placement, int]:
    """A parameter of any shape that a placement can split over some number of ranks."""
    size = draw(st.integers(1, 5))
    blocks = draw(st.integers(1, 3))
    dim = draw(st.sampled_from([None, 0, 1]))
    shape = [draw(st.integers(1, 4)), draw(st.integers(1, 4))]
    if dim is not None:
        shape[dim] *= size * blocks
    whole = torch.arange(shape[0] * shape[1]).view(*shape)
    return whole, Placement(dim, 1 if dim is None else blocks), size


@settings(deadline=None)  # the first example pays for torch's start
@given(whole_and_layout())
def test_merge_is_the_inverse_of_take(case: tuple[Tensor, Placement, int]) -> None:
    """For every shape, placement and number of ranks; each part has 1/size of the rows."""
    whole, placement, size = case
    parts = [take_slice(whole, placement, rank, size) for rank in range(size)]
    assert torch.equal(merge_slices(parts, placement), whole)
    for part in parts:
        assert global_shape(part.shape, placement, size) == whole.shape


def test_gate_and_up_are_split_each() -> None:
    """The worked example: of 4 + 4 rows on 2 ranks, rank 0 has rows 0, 1 and 4, 5."""
    placement = placement_of("heads.layers.1.block.mlp.linear_fc1.weight")
    whole = torch.arange(8).unsqueeze(1)
    parts = [take_slice(whole, placement, rank, 2).flatten().tolist() for rank in range(2)]
    assert parts == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_unknown_parameter_has_no_placement() -> None:
    """A new kind of parameter is refused by name until the table knows it."""
    with pytest.raises(KeyError, match=r"trunk\.adapter\.weight.*model/structure/sharding\.py"):
        placement_of("trunk.adapter.weight")


def local_shapes(config: ModelConfig, size: int) -> dict[str, torch.Size]:
    """Shapes of the parameters that megatron's layers make on this rank."""
    if size == 1:
        ensure_single_process()
    else:
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    return {name: p.shape for name, p in MultiTokenModel(config).named_parameters()}


@pytest.mark.parametrize("size", [1, 2])
def test_the_model_has_the_parameters_of_the_formulas(size: int) -> None:
    """Names and shapes of the built model, merged over the ranks, are those of the tables."""
    ranks = [local_shapes(CONFIG, 1)] if size == 1 else run_ranks(2, local_shapes, CONFIG, 2)
    for shapes in ranks:
        merged = {name: global_shape(s, placement_of(name), size) for name, s in shapes.items()}
        assert merged == SHAPES


def test_size_does_not_depend_on_the_number_of_heads() -> None:
    """The parameters that exist are as many as the formula says, for n = 1 .. 5 of 6 layers."""
    counts = set()
    for heads in range(1, 6):
        config = tiny_config(layers=6, future_tokens=heads)
        shapes = local_shapes(config, 1).values()
        assert sum(shape.numel() for shape in shapes) == config.num_parameters()
        counts.add(config.num_parameters())
    assert len(counts) == 1
