"""Rotary position embedding angles (Su et al. 2021), computed here because megatron's need CUDA.

Legend: S sequence, B batch, D head dimension.
"""

import torch
from torch import Tensor

from model.rope_scaling import RopeScaling


class RotaryTable:
    """Angles of the rotary embedding for any positions, in float32.

    A plain object rather than a module: as a module buffer the table would be cast to bf16 with
    the weights, and angles past position 256 would lose whole positions.

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
        self._sequences: dict[tuple[int, torch.device], Tensor] = {}

    def angles(self, positions: Tensor) -> Tensor:
        """Angles for given positions.

        Args:
            positions: `[S]` or `[B, S]` integer positions.

        Returns:
            `[S, 1, 1, D]` or `[S, B, 1, D]` float32, both halves of D alike (the rotate-half
            convention of Llama), as megatron's attention expects them.
        """
        exponents = torch.arange(0, self.head_dim, 2, device=positions.device).float()
        frequencies = 1.0 / self.theta ** (exponents / self.head_dim)
        if self.scaling is not None:
            frequencies = self.scaling.apply(frequencies)
        angles = positions.float().unsqueeze(-1) * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        if positions.dim() == 1:
            return angles[:, None, None, :]
        return angles.transpose(0, 1).unsqueeze(2).contiguous()

    def sequence(self, length: int, device: torch.device) -> Tensor:
        """Angles `[S, 1, 1, D]` for positions 0 .. length-1, kept for the next call."""
        key = (length, device)
        if key not in self._sequences:
            self._sequences[key] = self.angles(torch.arange(length, device=device))
        return self._sequences[key]
