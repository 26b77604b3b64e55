"""Low-rank adapters of the trunk's layers (Hu et al. 2021): their names and shapes.

A product y = W x gets y = W x + alpha / r * B (A x), with A `[r, in]` and B `[out, r]`. B begins as
zeros, so that a model with fresh adapters is the one without.
"""

from collections.abc import Iterator, Mapping

DOWN, UP = "adapter.down", "adapter.up"  # A and B, in the module of W
COLUMN_PRODUCTS = ("self_attention.linear_qkv", "mlp.linear_fc1")  # split by rows of W
ROW_PRODUCTS = ("self_attention.linear_proj", "mlp.linear_fc2")  # split by columns


def is_adapter(name: str) -> bool:
    """Whether a parameter is of an adapter."""
    return name.endswith((f".{DOWN}", f".{UP}"))


def adapters_of(name: str) -> tuple[str, str] | None:
    """The adapter's two parameters of a weight of this name; None of others than those products."""
    product, _, last = name.rpartition(".")
    if last != "weight" or not product.endswith(COLUMN_PRODUCTS + ROW_PRODUCTS):
        return None
    return f"{product}.{DOWN}", f"{product}.{UP}"


def with_adapters(
    shapes: Mapping[str, tuple[int, ...]], rank: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a layer's parameters with those of adapters of this r, if above 0."""
    for name, shape in shapes.items():
        yield name, shape
        if rank and (names := adapters_of(name)):
            yield names[0], (rank, shape[1])
            yield names[1], (shape[0], rank)
