"""Which drafts are kept: the laws of committed texts, enumerated and compared."""

import itertools
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from model.decoding.acceptance import accept_chain, accept_greedy, accept_siblings

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


# Trees, enumerated in rational arithmetic: what the production function says is a rational number
# of small denominator up to rounding, so that the laws below hold exactly or not at all.

P = tuple(Fraction(n, 12) for n in (5, 0, 4, 3))
Q = tuple(Fraction(n, 10) for n in (1, 4, 5, 0))


def rational(number: Tensor) -> Fraction:
    """The number that rounding has moved a little."""
    found = Fraction(float(number)).limit_denominator(100_000)
    assert abs(float(found) - float(number)) < 1e-12
    return found


def real(numbers: tuple[Fraction, ...]) -> Tensor:
    """As the production function takes them."""
    return torch.tensor([float(number) for number in numbers], dtype=torch.float64)


def drawn(q: tuple[Fraction, ...], count: int) -> Iterator[tuple[tuple[int, ...], Fraction]]:
    """Candidates that are drawn one after the other, none twice, with their probabilities."""
    for tokens in itertools.permutations([v for v, mass in enumerate(q) if mass], count):
        chance, left = Fraction(1), Fraction(1)
        for token in tokens:
            chance, left = chance * q[token] / left, left - q[token]
        yield tokens, chance


def given(
    p: tuple[Fraction, ...], q: tuple[Fraction, ...], tokens: tuple[int, ...], wrong: bool = False
) -> tuple[dict[int, Fraction], dict[int, Fraction]]:
    """How likely each candidate is kept, by its number, and each token given where none is."""
    found = accept_siblings(real(p), real(q), torch.tensor(tokens))
    kept, left = {}, Fraction(1)
    for number in range(len(tokens)):
        chance = rational(found.accept[number])
        kept[number], left = left * chance, left * (1 - chance)
    following = found.following[0 if wrong else len(tokens)]
    return kept, {v: left * rational(following[v]) for v in range(len(p))}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_one_of_some_candidates_or_another_token_has_the_targets_law(count: int) -> None:
    """Exactly, summed over all candidates; also where p has no mass on one, or q on another."""
    for p, q in itertools.product((P, Q, P[::-1]), repeat=2):
        law, wrong = dict.fromkeys(range(4), Fraction(0)), dict.fromkeys(range(4), Fraction(0))
        for tokens, chance in drawn(q, count):
            for sums, is_wrong in ((law, False), (wrong, True)):
                kept, instead = given(p, q, tokens, is_wrong)
                for number, share in kept.items():
                    sums[tokens[number]] += chance * share
                for token, share in instead.items():
                    sums[token] += chance * share
        assert tuple(law.values()) == p
        assert p == q or tuple(wrong.values()) != p


def test_candidates_that_may_come_twice_have_another_law() -> None:
    """The rule is for draws without replacement: others are seen to be wrong."""
    law = dict.fromkeys(range(4), Fraction(0))
    for tokens in itertools.product([v for v, mass in enumerate(Q) if mass], repeat=2):
        kept, instead = given(P, Q, tokens)
        chance = Q[tokens[0]] * Q[tokens[1]]
        for token, share in [(tokens[n], share) for n, share in kept.items()] + [*instead.items()]:
            law[token] += chance * share
    assert sum(law.values()) == 1
    assert tuple(law.values()) != P


def test_one_candidate_is_a_chain_of_one() -> None:
    """The same probabilities as those of `accept_chain`."""
    p, q = real(P), real(Q)
    for token in range(4):
        chosen = torch.tensor([token])
        tree = accept_siblings(p, q, chosen)
        chain = accept_chain(torch.stack([p, p]), q.unsqueeze(0), chosen)
        assert torch.equal(tree.accept, chain.accept)
        if q[token]:
            assert torch.equal(tree.following[1], chain.following[0])


def test_candidates_without_mass_are_never_kept() -> None:
    """Where q has nothing left a candidate changes nothing, whatever token stands there."""
    p, certain = real(P), torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    found = accept_siblings(p, certain, torch.tensor([2, 0, 2]))
    assert found.accept.tolist() == [float(P[2]), 0, 0]
    assert torch.equal(found.following[1], found.following[3])
    assert found.following[1, 2] == 0


def test_texts_of_a_tree_have_the_targets_law() -> None:
    """Two depths whose candidates are shared by all nodes, which have one or two children each."""
    first_q, second_q = Q[:3], tuple(Fraction(n, 6) for n in (3, 1, 2))

    def target(text: tuple[int, ...]) -> tuple[Fraction, ...]:
        weights = [1 + (7 * sum(text) + 3 * len(text) + token) % 4 for token in range(3)]
        return tuple(Fraction(weight, sum(weights)) for weight in weights)

    def texts(wrong: bool) -> dict[tuple[int, ...], Fraction]:
        law: dict[tuple[int, ...], Fraction] = {}
        for (firsts, a), (seconds, b) in itertools.product(drawn(first_q, 2), drawn(second_q, 2)):
            kept, instead = given(target(()), first_q, firsts)
            ends: dict[tuple[int, ...], Fraction] = {(v,): share for v, share in instead.items()}
            for rank, share in kept.items():
                text = (firsts[rank],)
                # Ranks sum to 1 at most; the wrong law tells each node of all candidates.
                below = seconds if wrong else seconds[: 2 - rank]
                deeper, other = given(target(text), second_q, below)
                if wrong and rank:  # and does not give it the second one
                    other[seconds[0]] += deeper.pop(1)
                for number, part in deeper.items():
                    other[below[number]] = other.get(below[number], Fraction(0)) + part
                for token, part in other.items():
                    pair = (*text, token)
                    ends[pair] = ends.get(pair, Fraction(0)) + share * part
            for whole, share in ends.items():
                law[whole] = law.get(whole, Fraction(0)) + a * b * share
        # What comes after a text that ended early is drawn from the target.
        for text in [whole for whole in law if len(whole) == 1]:
            share = law.pop(text)
            for token, p in enumerate(target(text)):
                law[(*text, token)] = law.get((*text, token), Fraction(0)) + share * p
        return law

    expected = {
        (x, y): target(())[x] * target((x,))[y] for x, y in itertools.product(range(3), repeat=2)
    }
    assert texts(wrong=False) == expected
    assert texts(wrong=True) != expected


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
