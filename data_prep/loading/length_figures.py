"""Lengths of documents in figures: percentiles, a histogram, and how they fit into sequences."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.loading.packing import pack

PERCENTILES = (1, 10, 50, 90, 99)
SEQUENCE_LENGTHS = (1024, 2048, 4096, 8192)


class SequenceFigures(NamedTuple):
    """What becomes of documents in sequences of one length.

    Attributes:
        sequence_length: Tokens of a sequence.
        fitting: Share of documents that are no longer than a sequence.
        cut: Share of those that concatenation cuts nevertheless.
        padding: Share of positions without a token in best-fit packing, which cuts none of them.
    """

    sequence_length: int
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


def sequence_figures(
    lengths: NDArray[np.int64], sequence_lengths: Sequence[int] = SEQUENCE_LENGTHS
) -> list[SequenceFigures]:
    """Concatenation against best-fit packing, for sequences of several lengths."""
    ends = np.cumsum(lengths)
    figures = []
    for sequence_length in sequence_lengths:
        fits = lengths <= sequence_length
        first, last = (ends - lengths) // sequence_length, (ends - 1) // sequence_length
        cut = int((fits & (first != last)).sum()) / max(int(fits.sum()), 1)
        padding = pack(lengths, sequence_length).padding_share
        figures.append(SequenceFigures(sequence_length, float(fits.mean()), cut, padding))
    return figures
