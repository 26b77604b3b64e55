"""Keys and values of a batch, with a length per row; and where a forward's new tokens stand.

Legend: B rows in use, C capacity, W width (keys looked at), S new positions, G key-value heads of a
layer (of all heads together in the heads' layer), D head dimension.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

WIDTH_STEP = 64


class Block(NamedTuple):
    """Where the new tokens of one forward stand; made once for all layers.

    Attributes:
        rows: B.
        cosine: `[B * S, 1, D]`.
        sine: `[B * S, 1, D]`, the first half of D negated.
        slots: `[B * S]` places in the cache, counted over all rows.
        mask: `[B or 1, 1, S or S * R, W]` to add to the scores, 0 or -inf, each position R times
            if there are several; None: the new tokens are the first of their rows and see
            themselves and what is before them.
        width: W.
    """

    rows: int
    cosine: Tensor
    sine: Tensor
    slots: Tensor
    mask: Tensor | None
    width: int

    def at(self, columns: Tensor) -> "Block":
        """The same for one of the S positions of each row; `columns` are `[B]` numbers of them."""
        positions = self.slots.shape[0] // self.rows
        numbers = torch.arange(self.rows, device=columns.device)
        chosen = numbers * positions + columns
        mask = self.mask
        if mask is not None:
            repeats = mask.shape[2] // positions
            row = numbers if mask.shape[0] > 1 else torch.zeros_like(numbers)
            mask = mask[row, 0, columns * repeats][:, None, None]
        return Block(
            self.rows,
            self.cosine[chosen],
            self.sine[chosen],
            self.slots[chosen],
            mask,
            self.width,
        )


class Cache:
    """Contiguous keys and values, one buffer for each layer of the trunk and one for all heads.

    Places past a row's length hold what may be anything finite: no mask shows them, and the next
    forward writes over them. So drafts are forgotten by not counting them in the length.

    Args:
        buffers: `[rows, C, 2, G, D]` of finite values. At the start every row is
            in use; B falls as rows leave, and grows as others join.

    Attributes:
        capacity: C.
        lengths: `[B]` tokens of each row that are in the cache.
    """

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        rows, self.capacity = buffers[0].shape[:2]
        device = buffers[0].device
        self.buffers = list(buffers)
        self._flat = [buffer.flatten(0, 1) for buffer in self.buffers]
        self._views: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self._first_slots = torch.arange(rows, device=device) * self.capacity

    @classmethod
    def zeros(
        cls,
        sizes: Sequence[int],
        rows: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "Cache":
        """A cache of new buffers.

        Args:
            sizes: G of every buffer.
            rows: how many there is room for.
            capacity: C.
            head_dim: D.
            dtype: of keys and values.
            device: where they are.
        """
        # Zeros: what no mask shows is multiplied by 0, which only finite values bear.
        return cls(
            [
                torch.zeros(rows, capacity, 2, size, head_dim, dtype=dtype, device=device)
                for size in sizes
            ]
        )

    @property
    def rows(self) -> int:
        """B."""
        return self.lengths.shape[0]

    def slots(self, places: Tensor) -> Tensor:
        """`[B, S]` places counted over all rows, from places within each row."""
        return places + self._first_slots[: self.rows].unsqueeze(1)

    def write(self, layer: int, slots: Tensor, keys_values: Tensor) -> None:
        """Put new keys and values into a buffer.

        Args:
            layer: the buffer's number.
            slots: `[B * S]`.
            keys_values: `[B * S, 2, G', D]`, G' the first of the buffer's G.
        """
        flat, groups = self._flat[layer], keys_values.shape[2]
        if groups < flat.shape[2]:
            flat = flat[:, :, :groups]
        flat.index_copy_(0, slots, keys_values)

    def read(self, layer: int, width: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """The first W keys and values of key-value heads `first` .. `last` - 1, as views.

        They are kept for the next call: making views costs as much as small products.

        Returns:
            `[B, G', W, D]` twice.
        """
        wanted = (layer, width, first, last)
        if wanted not in self._views:
            part = self.buffers[layer][: self.rows, :width, :, first:last].transpose(1, 3)
            self._views[wanted] = (part[:, :, 0], part[:, :, 1])
        return self._views[wanted]

    def beside(self, count: int) -> "Cache":
        """A cache over the same memory of the next `count` rows, which are not in use here."""
        part = slice(self.rows, self.rows + count)
        assert part.stop <= len(self._first_slots), (part, len(self._first_slots))
        return Cache([buffer[part] for buffer in self.buffers])

    def absorb(self, other: "Cache") -> None:
        """Take the rows of a cache that `beside` gave into use."""
        self.lengths = torch.cat([self.lengths, other.lengths])
        self._views.clear()

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Copy places `sources` to `targets`, `[...]` both counted over all rows."""
        for flat in self._flat:
            flat.index_copy_(0, targets.flatten(), flat.index_select(0, sources.flatten()))

    def gather(self, rows: Sequence[int], used: int) -> None:
        """Let row i become what row `rows[i]` is; a row may be taken more than once.

        Args:
            rows: numbers of rows in use, at most as many as there is room for.
            used: places that are in use in the longest row.
        """
        assert len(rows) <= len(self._first_slots), (len(rows), len(self._first_slots))
        order = list(rows)
        for buffer in self.buffers:
            buffer[: len(order), :used] = buffer[order, :used]
        self.lengths = self.lengths[order]
        self._views.clear()

    def gather_places(self, rows: Tensor, places: Tensor, lengths: Tensor) -> None:
        """Let each row become some places of a row, one after the other, in one copy.

        Args:
            rows: `[B']` numbers of rows in use; one may be taken more than once.
            places: `[B', U]` within these, past a row's length any.
            lengths: `[B']` of the new rows.
        """
        assert len(rows) <= len(self._first_slots), (len(rows), len(self._first_slots))
        count, used = places.shape
        sources = places + self._first_slots[rows].unsqueeze(1)
        for buffer, flat in zip(self.buffers, self._flat, strict=True):
            buffer[:count, :used] = flat[sources]
        self.lengths = lengths
        self._views.clear()

    def keep(self, order: Sequence[int], used: int) -> None:
        """Let only some rows stay; row `order[i]` becomes row i.

        Args:
            order: numbers of the rows that stay.
            used: places that are in use in the longest row.
        """
        for target, source in enumerate(order):
            if source != target:
                assert source > target, order
                for buffer in self.buffers:
                    buffer[target, :used] = buffer[source, :used]
        self.lengths = self.lengths[list(order)]
        self._views.clear()


def wide_enough(places: int, capacity: int) -> int:
    """W for so many places in use: few different values, so that shapes repeat."""
    return min(-(-places // WIDTH_STEP) * WIDTH_STEP, capacity)
