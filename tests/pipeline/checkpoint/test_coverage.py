"""Coverage: runs of elements are a model's weights and moments exactly once, or what is wrong."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import ModelConfig
from model.structure.parameter_shapes import parameter_shapes
from model.structure.sharding import placement_of
from pipeline.checkpoint.coverage import KINDS, Extent, coverage_problems

CONFIG = ModelConfig(
    layers=3,
    hidden_size=8,
    attention_heads=2,
    kv_heads=1,
    ffn_hidden_size=16,
    vocab_size=20,
    future_tokens=2,
)


def _trained(name: str) -> bool:
    return not name.startswith("trunk.embedding")


def _whole(tensor_size: int) -> list[Extent]:
    """One run for every slice of every parameter."""
    extents = []
    for name, shape in parameter_shapes(CONFIG).items():
        ranks = 1 if placement_of(name).dim is None else tensor_size
        count = math.prod(shape) // ranks
        for rank in range(ranks):
            for kind in KINDS if _trained(name) else KINDS[:1]:
                extents.append(Extent(kind, name, rank, 0, count))
    return extents


def _problems(extents: list[Extent], tensor_size: int) -> list[str]:
    return coverage_problems(extents, CONFIG, tensor_size=tensor_size, trained=_trained)


@given(data=st.data(), tensor_size=st.sampled_from([1, 2]))
def test_runs_cut_anywhere_and_in_any_order_are_whole(
    data: st.DataObject, tensor_size: int
) -> None:
    """How ranks share a parameter does not matter."""
    pieces = []
    for extent in _whole(tensor_size):
        cut = data.draw(st.integers(0, extent.stop))
        pieces += [extent._replace(stop=cut), extent._replace(start=cut)]
    pieces = [piece for piece in pieces if piece.start < piece.stop]
    assert _problems(data.draw(st.permutations(pieces)), tensor_size) == []


@given(data=st.data())
def test_what_is_missing_is_named(data: st.DataObject) -> None:
    """Any elements of any run."""
    extents = _whole(1)
    number = data.draw(st.integers(0, len(extents) - 1))
    extent = extents[number]
    start = data.draw(st.integers(0, extent.stop - 1))
    stop = data.draw(st.integers(start + 1, extent.stop))
    extents[number : number + 1] = [extent._replace(stop=start), extent._replace(start=stop)]
    extents = [piece for piece in extents if piece.start < piece.stop]
    (problem,) = _problems(extents, 1)
    assert problem.startswith(f"{extent.kind} of {extent.name} (tensor-parallel rank 0)")
    assert f"is missing elements {start:,} to {stop - 1:,}" in problem


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (Extent("weight", "heads.layers.1.block.mlp.linear_fc2.weight", 0, 3, 5), "held twice"),
        (Extent("exp_avg", "trunk.embedding.weight", 0, 0, 160), "is not the model's"),
        (Extent("weight", "trunk.layers.9.x", 0, 0, 1), "is not the model's"),
        (Extent("weight", "heads.readout.norm_weight", 0, 8, 9), "9 elements instead of 8"),
    ],
    ids=["twice", "moments of what is frozen", "unknown", "too many"],
)
def test_what_is_too_much_is_named(extra: Extent, words: str) -> None:
    """Elements that two ranks hold, or that are no part of the model."""
    (problem,) = _problems([*_whole(1), extra], 1)
    assert words in problem
    assert extra.name in problem
