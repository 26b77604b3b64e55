"""A keyed permutation of 0..size-1 without a table: index i costs the same at any size.

A balanced Feistel network over the next power of four that holds `size`; results outside 0..size-1
are fed in again until they fall inside (cycle walking, under four rounds on average), which keeps
the mapping a bijection.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

NUM_ROUNDS = 6
MIX_A = np.uint64(0xFF51AFD7ED558CCD)
MIX_B = np.uint64(0xC4CEB9FE1A85EC53)
MIX_SHIFT = np.uint64(33)


class Permutation:
    """The order of an epoch: a pure function of (size, fingerprint, seed, epoch).

    Args:
        size: Number of items.
        fingerprint: Fingerprint of the shard set.
        seed: The run's seed.
        epoch: Which pass over the data, from 0.
    """

    def __init__(self, size: int, fingerprint: str, seed: int, epoch: int) -> None:
        assert 0 < size < 1 << 62, size
        self.size = size
        half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._half_bits = np.uint64(half_bits)
        self._mask = np.uint64((1 << half_bits) - 1)
        material = hashlib.sha512(f"{fingerprint}:{seed}:{epoch}".encode()).digest()
        self._keys = np.frombuffer(material, dtype="<u8")[:NUM_ROUNDS].astype(np.uint64)

    def __call__(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Map `indices` (each in 0..size-1) to their places; vectorised."""
        values = np.asarray(indices).astype(np.uint64)
        assert values.size == 0 or int(values.max()) < self.size, (values.max(), self.size)
        result = self._encrypt(values)
        outside = np.flatnonzero(result >= np.uint64(self.size))
        while outside.size:
            walked = self._encrypt(result[outside])
            result[outside] = walked
            outside = outside[walked >= np.uint64(self.size)]
        return result.astype(np.int64)

    def _encrypt(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> self._half_bits, values & self._mask
        for key in self._keys:
            mixed = right ^ key
            mixed = (mixed ^ (mixed >> MIX_SHIFT)) * MIX_A
            mixed = (mixed ^ (mixed >> MIX_SHIFT)) * MIX_B
            mixed ^= mixed >> MIX_SHIFT
            left, right = right, left ^ (mixed & self._mask)
        return (left << self._half_bits) | right
