"""Which drafts are kept: the laws of committed texts, enumerated and compared."""

import itertools

import pytest
import torch
from torch import Tensor

from model.decoding.acceptance import accept_chain, accept_greedy

# The distribution of sampled texts, enumerated: an order-2 Markov target over 3 tokens, any drafts.

VOCABULARY = 3
LENGTH = 4


def random_distribution(*key: int) -> Tensor:
    """A distribution over the vocabulary, fixed by the key; some give one token no mass."""
    generator = torch.Generator().manual_seed(hash(key) % 2**31)
    distribution = torch.rand(VOCABULARY, generator=generator, dtype=torch.float64)
    if sum(key) % 3 == 0:
        distribution[sum(key) % VOCABULARY] = 0
    return distribution / distribution.sum()


def target_distribution(text: tuple[int, ...]) -> Tensor:
    """What head 1 says after a text: it looks at two tokens."""
    return random_distribution(1, *text[-2:])


def draft_distributions(text: tuple[int, ...], num_drafts: int) -> Tensor:
    """What heads 2 .. say after a text, `[num_drafts, V]`."""
    return torch.stack([random_distribution(2 + head, *text[-1:]) for head in range(num_drafts)])


def enumerated_distribution(
    text: tuple[int, ...], following: int, num_drafts: int, wrong: bool
) -> dict[tuple[int, ...], float]:
    """Distribution of the whole text, summed over all drafts, acceptances and draws.

    Args:
        text: tokens before `following`; the drafts were drawn after them.
        following: the last committed token.
        num_drafts: k - 1.
        wrong: leave the residual distribution out, which must show.
    """
    begin = (*text, following)
    if len(begin) >= LENGTH:
        return {begin[:LENGTH]: 1.0}
    result: dict[tuple[int, ...], float] = {}
    draft = draft_distributions(text, num_drafts)
    for drafts in itertools.product(range(VOCABULARY), repeat=num_drafts):
        drawn = torch.tensor(drafts)
        chance = float(draft.gather(1, drawn.unsqueeze(1)).prod())
        if chance == 0:
            continue
        target = torch.stack(
            [target_distribution(begin + drafts[:j]) for j in range(num_drafts + 1)]
        )
        chain = accept_chain(target, draft, drawn)
        for kept in range(num_drafts + 1):
            here = chance * float(chain.accept[:kept].prod())
            if kept < num_drafts:
                here *= 1 - float(chain.accept[kept])
            distributions = target if wrong else chain.following
            for token in range(VOCABULARY):
                share = here * float(distributions[kept, token])
                if share == 0:
                    continue
                rest = enumerated_distribution(begin + drafts[:kept], token, num_drafts, wrong)
                for whole, part in rest.items():
                    result[whole] = result.get(whole, 0.0) + share * part
    return result


def largest_error(num_drafts: int, wrong: bool = False) -> float:
    """Largest difference between the enumerated distribution and the target's."""
    error = 0.0
    distribution = enumerated_distribution((0,), 1, num_drafts, wrong)
    for rest in itertools.product(range(VOCABULARY), repeat=LENGTH - 2):
        text = (0, 1, *rest)
        expected = 1.0
        for position in range(2, LENGTH):
            expected *= float(target_distribution(text[:position])[text[position]])
        error = max(error, abs(distribution.get(text, 0.0) - expected))
    return error


@pytest.mark.parametrize("num_drafts", [1, 2])
def test_sampling_has_the_target_distribution(num_drafts: int) -> None:
    """Enumerated over every branch, texts have head 1's distribution, whatever drafts come from."""
    assert largest_error(num_drafts) < 1e-12
    assert largest_error(num_drafts, wrong=True) > 1e-3


def test_equal_distributions_accept_everything() -> None:
    """When p = q every draft is accepted, and the next token's probabilities still sum to 1."""
    draft = torch.tensor([[0.2, 0.8], [0.5, 0.5]])
    result = accept_chain(torch.cat([draft, draft[:1]]), draft, torch.tensor([1, 0]))
    assert torch.equal(result.accept, torch.ones(2))
    assert torch.equal(result.following.sum(-1), torch.ones(3))


def test_greedy_keeps_the_leading_right_drafts() -> None:
    """Drafts after a wrong one are not kept, right or not; what follows is head 1's."""
    best = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8]])
    drafts = torch.tensor([[5, 6, 7], [5, 0, 7], [0, 6, 7], [5, 6, 0]])
    kept, following = accept_greedy(best, drafts)
    assert kept.tolist() == [3, 1, 0, 2]
    assert following.tolist() == [8, 6, 5, 7]
    kept, following = accept_greedy(best[:, :1], drafts[:, :0])
    assert kept.tolist() == [0, 0, 0, 0]
    assert following.tolist() == [5, 5, 5, 5]
