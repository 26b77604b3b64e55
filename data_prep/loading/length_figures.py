"""Lengths of documents in figures: percentiles, a histogram, and what rows make of them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.loading.packing import pack

PERCENTILES = (1, 10, 50, 90, 99)
ROW_LENGTHS = (1024, 2048, 4096, 8192)


class RowFigures(NamedTuple):
    """What becomes of documents in rows of one length.

    Attributes:
        row_length: Tokens of a row.
        fitting: Share of documents that are no longer than a row.
        cut: Share of those that concatenation cuts nevertheless.
        padding: Share of positions without a token in best-fit packing, which cuts none of them.
    """

    row_length: int
    fitting: float
    cut: float
    padding: float


def percentiles(lengths: NDArray[np.int64]) -> list[tuple[str, int]]:
    """Name and value of the percentiles and the maximum."""
    values = np.percentile(lengths, PERCENTILES, method="lower")
    named = [
        (f"p{percent}", int(value)) for percent, value in zip(PERCENTILES, values, strict=True)
    ]
    return [*named, ("longest", int(lengths.max()))]


def histogram(lengths: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Documents, and tokens in them, by powers of two: entry i has lengths 2^i to 2^(i+1) - 1."""
    exponents = np.frexp(lengths.astype(np.float64))[1] - 1
    documents = np.bincount(exponents)
    tokens = np.bincount(exponents, weights=lengths).astype(np.int64)
    return documents, tokens


def row_figures(
    lengths: NDArray[np.int64], row_lengths: Sequence[int] = ROW_LENGTHS
) -> list[RowFigures]:
    """Concatenation against best-fit packing, for rows of several lengths."""
    ends = np.cumsum(lengths)
    figures = []
    for row_length in row_lengths:
        fits = lengths <= row_length
        first_row, last_row = (ends - lengths) // row_length, (ends - 1) // row_length
        cut = int((fits & (first_row != last_row)).sum()) / max(int(fits.sum()), 1)
        padding = pack(lengths, row_length).padding_share
        figures.append(RowFigures(row_length, float(fits.mean()), cut, padding))
    return figures
