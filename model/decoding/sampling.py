"""From logits to the distribution that is sampled, and from a distribution to a token.

Legend: B rows, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
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


def penalize(logits: Tensor, seen: Tensor, penalty: float | Tensor) -> Tensor:
    """Logits `[..., V]` with those of the tokens `seen` `[..., V]` (bool) made less likely."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


class RowSampling:
    """The sampling of each row of a batch.

    Every value is a tensor of the rows, though all may be equal: so a row gets the same bits in any
    company.

    Args:
        samplings: one for each row.
        device: where the logits are.

    Attributes:
        samplings: as given.
        greedy: whether every row is.
        penalized: whether any row has a repetition penalty.
    """

    def __init__(self, samplings: Sequence[Sampling], device: torch.device) -> None:
        self.samplings = list(samplings)
        self.greedy = all(sampling.greedy for sampling in samplings)
        self.penalized = any(sampling.repetition_penalty != 1 for sampling in samplings)
        self._device = device
        self._columns: dict[tuple[str, torch.dtype], Tensor] = {}
        self._most_k = max((sampling.top_k for sampling in samplings), default=0)
        self._some_greedy = any(sampling.greedy for sampling in samplings)
        self._some_top_p = any(sampling.top_p < 1 for sampling in samplings)
        self._some_min_p = any(sampling.min_p > 0 for sampling in samplings)

    def penalized_logits(self, logits: Tensor, seen: Tensor) -> Tensor:
        """Logits `[B, S, V]` with those of the tokens `seen` `[B, 1 or S, V]` made less likely."""
        kind = torch.promote_types(logits.dtype, torch.float32)
        return penalize(logits.to(kind), seen, self._column("repetition_penalty", kind))

    def chosen_from(self, logits: Tensor) -> Tensor:
        """What tokens are drawn from: of a greedy row all is on its likeliest token, `[B, S, V]`.

        So speculative sampling does to greedy rows what greedy decoding does: a draft is kept if it
        is that token, and it follows if not.
        """
        found = self.distributions(logits)
        if not self._some_greedy:
            return found
        best = torch.zeros_like(found).scatter(-1, logits.argmax(-1, keepdim=True), 1)
        return torch.where(self._column("greedy", torch.bool), best, found)

    def distributions(self, logits: Tensor) -> Tensor:
        """The distributions `[B, S, V]` of logits, in fp32 or more; of greedy rows as they are.

        Logits that are not finite give one that is not finite, either.
        """
        found = torch.softmax(self._scaled(logits), dim=-1)
        if not (self._some_top_p or self._some_min_p):
            return found
        kept = self._cut(found)
        kept = kept / kept.sum(-1, keepdim=True)
        return torch.where(self._column("cut", torch.bool), kept, found)

    def log_distributions(self, logits: Tensor) -> Tensor:
        """Their logarithms, also where a probability is too small for a number; -inf of none."""
        found = torch.log_softmax(self._scaled(logits), dim=-1)
        if not (self._some_top_p or self._some_min_p):
            return found
        kept = found.masked_fill(self._cut(found.exp()) == 0, -torch.inf)
        kept = kept - kept.logsumexp(-1, keepdim=True)
        return torch.where(self._column("cut", torch.bool), kept, found)

    def _scaled(self, logits: Tensor) -> Tensor:
        """Logits after temperature and top-k, in fp32 or more."""
        kind = torch.promote_types(logits.dtype, torch.float32)
        scaled = logits.to(kind) / self._column("temperature", kind)
        return self._of_likeliest(scaled) if self._most_k else scaled

    def _cut(self, found: Tensor) -> Tensor:
        """Probabilities with 0 for what top-p and min-p leave out; not normalized."""
        kept = found
        if self._some_top_p:
            ordered, order = kept.sort(dim=-1, descending=True)
            # A token stays while those before it have not reached the sum; so the first one does.
            late = ordered.cumsum(-1) - ordered >= self._column("top_p", found.dtype)
            kept = kept.masked_fill(late.scatter(-1, order, late), 0)
        if self._some_min_p:
            least = self._column("min_p", found.dtype) * kept.amax(-1, keepdim=True)
            kept = kept.masked_fill(kept < least, 0)
        return kept

    def _of_likeliest(self, scaled: Tensor) -> Tensor:
        """Logits of all but a row's k likeliest tokens made infinitely small."""
        most = min(self._most_k, scaled.shape[-1])
        k = self._column("top_k", torch.long)
        places = (k - 1).clamp(0, most - 1).expand(-1, scaled.shape[1], 1)
        least = scaled.topk(most, dim=-1).values.gather(-1, places)
        return scaled.masked_fill((scaled < least) & (k > 0), -torch.inf)

    def _column(self, name: str, kind: torch.dtype) -> Tensor:
        """One value of every row, `[B, 1, 1]`."""
        if (name, kind) not in self._columns:
            values = [_VALUES[name](sampling) for sampling in self.samplings]
            column = torch.tensor(values, dtype=kind, device=self._device)
            self._columns[name, kind] = column.view(-1, 1, 1)
        return self._columns[name, kind]


# What a row's column holds; values that change nothing where they do not apply.
_VALUES: dict[str, Callable[[Sampling], float]] = {
    "temperature": lambda sampling: 1.0 if sampling.greedy else sampling.temperature,
    "greedy": lambda sampling: sampling.greedy,
    "top_k": lambda sampling: sampling.top_k,
    "top_p": lambda sampling: sampling.top_p if sampling.top_p < 1 else math.inf,
    "min_p": lambda sampling: sampling.min_p,
    "cut": lambda sampling: sampling.top_p < 1 or sampling.min_p > 0,
    "repetition_penalty": lambda sampling: sampling.repetition_penalty,
}


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
        self._ahead = torch.empty(len(seeds), 0, dtype=torch.float64, device=device)

    def next(self, count: int) -> Tensor:
        """The next `[B, count]` numbers."""
        if self._ahead.shape[1] < count:
            self._make(max(count, _AHEAD))
        numbers, self._ahead = self._ahead[:, :count], self._ahead[:, count:]
        return numbers

    def join(self, other: "RowUniforms") -> None:
        """Add the rows of another one; each goes on with its own numbers."""
        behind = self._ahead.shape[1] - other._ahead.shape[1]
        if behind > 0:
            other._make(behind)
        elif behind < 0:
            self._make(-behind)
        self._generators = self._generators + other._generators
        self._ahead = torch.cat([self._ahead, other._ahead])

    def _make(self, count: int) -> None:
        fresh = [
            torch.rand(count, generator=generator, dtype=torch.float64)
            for generator in self._generators
        ]
        # A copy to a GPU waits for all that it has been told to compute.
        self._ahead = torch.cat([self._ahead, torch.stack(fresh).to(self._device)], dim=1)

    def keep(self, order: Sequence[int]) -> None:
        """Row `order[i]` becomes row i; the others are gone."""
        self._generators = [self._generators[row] for row in order]
        self._ahead = self._ahead[list(order)]
