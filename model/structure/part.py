"""Which part of the model a rank's stage holds: a run of trunk layers, a run of heads, or both."""

from typing import NamedTuple

from model.config import ModelConfig


class ModelPart(NamedTuple):
    """One pipeline stage's share of the model.

    The embedding lives with trunk layer 0. The final norm and the unembedding are trained where
    head 1 lives; every other stage with heads computes with a copy of them.

    Attributes:
        trunk_layers: numbers of its trunk layers, from 0; may be empty.
        heads: numbers of its heads, from 1; may be empty.
    """

    trunk_layers: range
    heads: range

    @classmethod
    def whole(cls, config: ModelConfig) -> "ModelPart":
        """Everything: the part of a run without pipeline stages."""
        return cls(range(config.trunk_layers), range(1, config.future_tokens + 1))

    @property
    def has_embedding(self) -> bool:
        """Whether tokens enter here."""
        return 0 in self.trunk_layers

    @property
    def owns_lm_head(self) -> bool:
        """Whether the final norm and the unembedding are trained here."""
        return 1 in self.heads

    def describe(self) -> str:
        """For example `trunk 0-13`, `heads 1-2`, or both joined by a plus sign."""
        named = [("trunk", self.trunk_layers), ("heads", self.heads)]
        return " + ".join(f"{name} {span_text(numbers)}" for name, numbers in named if numbers)


def span_text(numbers: range) -> str:
    """A run of numbers as people write it: `3`, or `0-13`."""
    first, last = numbers[0], numbers[-1]
    return str(first) if first == last else f"{first}-{last}"
