"""From logits to the distribution that is sampled, and from a distribution to a token.

Legend: B rows, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Numbers that are made at once for a row; making one costs about as much as making many.
_AHEAD = 256


class Sampling(NamedTuple):
    """How the next token is chosen; the values given here choose the likeliest.

    They apply in the order of `transformers`: penalty, temperature, top-k, top-p, min-p.

    Attributes:
        temperature: logits are divided by it; 0 = the likeliest token.
        top_k: only the k likeliest tokens; 0 = all.
        top_p: only the likeliest tokens that together reach this probability (Holtzman et al.
            2020); 1 = all.
        min_p: only tokens of at least this part of the likeliest one's probability (Nguyen et al.
            2024); 0 = all.
        repetition_penalty: positive logits of tokens that the text already has are divided by it,
            negative ones multiplied (Keskar et al. 2019); 1 = none.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0


GREEDY = Sampling()


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits `[..., V]` with those of the tokens `seen` `[..., V]` (bool) made less likely."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution `[..., V]` that is drawn from, in fp32 or more; temperature above 0.

    Logits that are not finite give one that is not finite, either.
    """
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / sampling.temperature
    if 0 < sampling.top_k < scaled.shape[-1]:
        least = scaled.topk(sampling.top_k, dim=-1).values[..., -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    probabilities = torch.softmax(scaled, dim=-1)
    if sampling.top_p >= 1 and sampling.min_p <= 0:
        return probabilities
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        # A token stays while those before it have not reached the sum; so the first one always does
        late = ordered.cumsum(-1) - ordered >= sampling.top_p
        probabilities = probabilities.masked_fill(late.scatter(-1, order, late), 0)
    if sampling.min_p > 0:
        least = sampling.min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    return probabilities / probabilities.sum(-1, keepdim=True)


def draw(distributions: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens `[...]` of distributions `[..., V]`, by uniform numbers `[...]` from [0, 1).

    Token v is drawn by the numbers from the sum of all before it up to the sum with it, so one
    without mass never is.
    """
    sums = distributions.cumsum(-1, dtype=torch.float64)
    total = sums[..., -1]
    wanted = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(sums, wanted.unsqueeze(-1), right=True).squeeze(-1)
    return tokens.clamp(max=distributions.shape[-1] - 1)  # of one that is not finite


class RowUniforms:
    """Uniform numbers for each row from a generator of its own.

    What a row gets does not depend on the others, nor on the device.

    Args:
        seeds: one for each row.
        device: where the numbers are used.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._device = device
        self._ahead = torch.empty(len(seeds), 0, dtype=torch.float64)

    def next(self, count: int) -> Tensor:
        """The next `[B, count]` numbers."""
        if self._ahead.shape[1] < count:
            fresh = [
                torch.rand(max(count, _AHEAD), generator=generator, dtype=torch.float64)
                for generator in self._generators
            ]
            self._ahead = torch.cat([self._ahead, torch.stack(fresh)], dim=1)
        numbers, self._ahead = self._ahead[:, :count], self._ahead[:, count:]
        return numbers.to(self._device, non_blocking=True)

    def keep(self, order: Sequence[int]) -> None:
        """Row `order[i]` becomes row i; the others are gone."""
        self._generators = [self._generators[row] for row in order]
        self._ahead = self._ahead[list(order)]
