"""Which sequence each sample of a run is: a pure function of the sample's number."""

import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data_prep.loading.mixture import Mixture
from data_prep.loading.permutation import Permutation

BLOCK_SAMPLES = 1024
KEPT_BLOCKS = 4


class Order(Protocol):
    """Which sequence each sample is."""

    def locate(self, first_sample: int, count: int) -> tuple[list[int], list[int]]:
        """Number of the source, and of the sequence in it, of each sample of a range."""
        ...

    def step_end(self, sample: int, batch: int) -> int:
        """The end of the step that begins with a sample: `batch` samples on, or sooner."""
        ...


class SampleOrder:
    """The source, and the sequence in it, of every sample of a run.

    The mixture says which source gives sample s, and which of its samples it is. Each source has an
    order and epochs of its own: with c sequences, its sample j is sequence permutation(epoch)(j mod
    c) of epoch j // c. Safe to share between threads.

    Args:
        mixture: Which source a sample comes from.
        counts: Sequences of each source, in the order of the mixture's sources.
        fingerprints: Of each source; part of the key of its permutations.
        seed: The run's seed.
        shuffle: False = sequences in stream order.
    """

    def __init__(
        self,
        mixture: Mixture,
        counts: Sequence[int],
        fingerprints: Sequence[str],
        *,
        seed: int,
        shuffle: bool,
    ) -> None:
        self.mixture = mixture
        self._counts = tuple(counts)
        self._fingerprints = tuple(fingerprints)
        self._seed = seed
        self._shuffle = shuffle
        self._blocks: dict[int, NDArray[np.int64]] = {}
        self._lock = threading.Lock()

    def locate(self, first_sample: int, count: int) -> tuple[list[int], list[int]]:
        """Number of the source, and of the sequence in it, of each sample of a range."""
        first_block = first_sample // BLOCK_SAMPLES
        last_block = (first_sample + count - 1) // BLOCK_SAMPLES
        blocks = [self._block(number) for number in range(first_block, last_block + 1)]
        start = first_sample - first_block * BLOCK_SAMPLES
        sources, sequences = np.concatenate(blocks, axis=1)[:, start : start + count].tolist()
        return sources, sequences

    def step_end(self, sample: int, batch: int) -> int:
        """The end of the step that begins with a sample: always `batch` samples on."""
        return sample + batch

    def _block(self, number: int) -> NDArray[np.int64]:
        """A block of samples, located at once: one by one they take longer to find than to read.

        The last few blocks are kept, since the batches of some steps come from the same one.
        """
        with self._lock:
            block = self._blocks.get(number)
        if block is None:
            block = self._locate_block(number)
            with self._lock:
                self._blocks[number] = block
                while len(self._blocks) > KEPT_BLOCKS:
                    del self._blocks[next(iter(self._blocks))]
        return block

    def _locate_block(self, number: int) -> NDArray[np.int64]:
        """Numbers of sources and sequences, `[2, BLOCK_SAMPLES]`."""
        first = number * BLOCK_SAMPLES
        sources, indices = self.mixture.locate(np.arange(first, first + BLOCK_SAMPLES))
        sequences = np.empty_like(indices)
        for source in np.unique(sources).tolist():
            chosen = np.flatnonzero(sources == source)
            epochs, within_epoch = np.divmod(indices[chosen], self._counts[source])
            sequences[chosen] = within_epoch
            for epoch in np.unique(epochs).tolist() if self._shuffle else ():
                now = epochs == epoch
                permutation = Permutation(
                    self._counts[source], self._fingerprints[source], self._seed, epoch
                )
                sequences[chosen[now]] = permutation(within_epoch[now])
        return np.stack([sources, sequences])
