"""Rotary position embedding (Su et al. 2021): cosines and sines, made once for all layers.

Legend: S sequence, B batch, D head dimension.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from model.operations.rope_scaling import RopeScaling


class Rotation(NamedTuple):
    """By how much each position turns the pairs (i, i + D/2) of a query or key.

    Attributes:
        cos: `[S, 1 or B, 1, D / 2]`, in the layers' dtype.
        sin: likewise.
    """

    cos: Tensor
    sin: Tensor


class RotaryTable:
    """The rotary embedding at any positions.

    A plain object rather than a module: as a module buffer the table would be cast to bf16 with
    the weights, and angles past position 256 would lose whole positions. Angles are float32; only
    their cosines and sines take the layers' dtype.

    Args:
        head_dim: D, even.
        theta: base of the geometric progression of wavelengths.
        scaling: of the frequencies; None = none.
    """

    def __init__(self, head_dim: int, theta: float, scaling: RopeScaling | None = None) -> None:
        assert head_dim % 2 == 0, head_dim
        self.head_dim = head_dim
        self.theta = theta
        self.scaling = scaling
        self._sequences: dict[tuple[int, torch.device, torch.dtype], Rotation] = {}

    def angles(self, positions: Tensor) -> Tensor:
        """Angles for given positions.

        Args:
            positions: `[S]` or `[B, S]` integer positions.

        Returns:
            `[S, 1, 1, D / 2]` or `[S, B, 1, D / 2]` float32.
        """
        exponents = torch.arange(0, self.head_dim, 2, device=positions.device).float()
        frequencies = 1.0 / self.theta ** (exponents / self.head_dim)
        if self.scaling is not None:
            frequencies = self.scaling.apply(frequencies)
        angles = positions.float().unsqueeze(-1) * frequencies
        if positions.dim() == 1:
            return angles[:, None, None, :]
        return angles.transpose(0, 1).unsqueeze(2).contiguous()

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """Cosines and sines for given positions `[S]` or `[B, S]`."""
        angles = self.angles(positions)
        return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))

    def sequence(self, length: int, device: torch.device, dtype: torch.dtype) -> Rotation:
        """Those of positions 0 .. length-1, kept for the next call."""
        key = (length, device, dtype)
        if key not in self._sequences:
            self._sequences[key] = self.rotation(torch.arange(length, device=device), dtype)
        return self._sequences[key]
