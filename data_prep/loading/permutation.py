"""A keyed permutation of 0..size-1 without a table: index i costs the same at any size.

A Feistel network over pairs of digits in base ceil(sqrt(size)). Its domain is the next square, so
nearly every result is in 0..size-1; the few outside are fed in again until they are (cycle
walking), which keeps the mapping a bijection.
"""

import hashlib
import math

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
        self._base = np.uint64(math.isqrt(size - 1) + 1)
        material = hashlib.sha512(f"{fingerprint}:{seed}:{epoch}".encode()).digest()
        self._keys = np.frombuffer(material, dtype="<u8")[:NUM_ROUNDS].astype(np.uint64)

    def __call__(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Map `indices` (each in 0..size-1) to their positions in the order; vectorized."""
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
        """One pass through the network; a round maps (left, right) to (right, left + mix(right)).

        The sum is taken modulo the base, so that a round can be undone whatever the mix is.
        """
        left, right = np.divmod(values, self._base)
        for key in self._keys:
            mixed = (right ^ key) * MIX_A
            mixed ^= mixed >> MIX_SHIFT
            mixed *= MIX_B
            mixed ^= mixed >> MIX_SHIFT
            # Halved, the sum with a digit (below 2^31) cannot overflow 64 bits.
            mixed >>= np.uint64(1)
            left, right = right, (left + mixed) % self._base
        return left * self._base + right
