"""Slower rotary frequencies, for sequences longer than those a model was first trained on.

The kinds, their parameters' names and their formulas are those of Hugging Face's Llama, so that a
`config.json` can be used unchanged.
"""

import math
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:  # configurations are read without waiting for torch
    from torch import Tensor

_OF_LLAMA3 = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class RopeScaling(BaseModel):
    """How the rotary frequencies are scaled.

    Attributes:
        rope_type: `linear` divides every frequency by `factor` (position interpolation, Chen et
            al. 2023); `llama3` only the slow ones, with a smooth transition in between.
        factor: what frequencies are divided by.
        low_freq_factor: llama3: frequencies with fewer turns than this within the original
            length are divided by `factor`.
        high_freq_factor: llama3: those with more turns than this stay as they are.
        original_max_position_embeddings: llama3: the original length.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    rope_type: Literal["linear", "llama3"]
    factor: float = Field(ge=1, le=1e6)
    low_freq_factor: float | None = Field(default=None, gt=0)
    high_freq_factor: float | None = Field(default=None, gt=0)
    original_max_position_embeddings: int | None = Field(default=None, gt=0, lt=2**31)

    @model_validator(mode="after")
    def _has_the_parameters_of_its_kind(self) -> Self:
        given = [name for name in _OF_LLAMA3 if getattr(self, name) is not None]
        if self.rope_type == "linear" and given:
            raise ValueError(
                f"rope_scaling.{given[0]} has no effect with rope_type=linear; remove it or use "
                "rope_type=llama3"
            )
        if self.rope_type == "llama3":
            if missing := [name for name in _OF_LLAMA3 if name not in given]:
                raise ValueError(
                    f"rope_scaling.{missing[0]} is missing; rope_type=llama3 needs "
                    f"{', '.join(_OF_LLAMA3)} beside factor"
                )
            assert self.low_freq_factor is not None
            assert self.high_freq_factor is not None
            if self.low_freq_factor >= self.high_freq_factor:
                raise ValueError(
                    f"rope_scaling.low_freq_factor={self.low_freq_factor} must be smaller than "
                    f"high_freq_factor={self.high_freq_factor}; Llama 3 has 1 and 4"
                )
        return self

    def parameters(self) -> dict[str, Any]:
        """The parameters that this kind has, under Hugging Face's names."""
        return self.model_dump(exclude_none=True)

    def apply(self, frequencies: "Tensor") -> "Tensor":
        """Scaled frequencies, in radians per position, from unscaled ones of the same shape.

        Example, llama3 with factor 8, low 1, high 4, original length 8192: a frequency of more
        than 4 turns in 8192 positions stays, one of less than 1 is divided by 8, one of 2.5 turns
        is half of each.
        """
        if self.rope_type == "linear":
            return frequencies / self.factor
        assert self.low_freq_factor is not None
        assert self.high_freq_factor is not None
        assert self.original_max_position_embeddings is not None
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        scaled = (1 - kept) * frequencies / self.factor + kept * frequencies
        # Outside the band exactly one of the two, without the rounding of a sum.
        scaled = (frequencies / self.factor).where(turns <= low, scaled)
        return frequencies.where(turns >= high, scaled)
