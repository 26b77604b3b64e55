"""Which drafts are kept by their joint probability: enumerated, beside rules that are wrong.

The published rule and what must follow from it (J1 to J8 below), on an order-2 Markov target and a
drafter over three tokens whose probabilities are fractions. Decisions come from the function that
decoders use; laws are added up in exact arithmetic.
"""

import functools
import itertools
import math
import random
from collections.abc import Callable, Sequence
from fractions import Fraction

import pytest
import torch

from model.joint_decoding.acceptance import accept_joint

VOCABULARY, DRAFTS, LENGTH = 3, 3, 4
Text = tuple[int, ...]
Law = dict[Text, Fraction]
Accept = Callable[[Sequence[Fraction], Sequence[Fraction], Fraction], int]
THRESHOLDS = [Fraction(0), Fraction(3, 17), Fraction(1, 2), Fraction(9, 10), Fraction(1)]


def conditional(salt: int, text: Text) -> list[Fraction]:
    """A distribution over the next token that two tokens before it decide."""
    chance = random.Random(f"{salt} {text[-2:]}")
    parts = [chance.randint(1, 12) for _ in range(VOCABULARY)]
    return [Fraction(part, sum(parts)) for part in parts]


def target(text: Text) -> list[Fraction]:
    """What head 1 says after a text."""
    return conditional(1, text)


def drafter(text: Text) -> list[Fraction]:
    """What drafts say after a text."""
    return conditional(2, text)


def joint(model: Callable[[Text], list[Fraction]], text: Text, drafts: Text) -> list[Fraction]:
    """Probabilities of the first 1, 2, .. drafts after a text."""
    steps = [model(text + drafts[:i])[token] for i, token in enumerate(drafts)]
    return [math.prod(steps[: i + 1], start=Fraction(1)) for i in range(len(steps))]


def accepted(target: Sequence[Fraction], draft: Sequence[Fraction], tau: Fraction) -> int:
    """How many drafts of a chain the function that decoders use keeps."""
    return int(
        accept_joint(
            torch.tensor([0.0, *map(math.log, target)], dtype=torch.float64),
            torch.tensor([0.0, *map(math.log, draft)], dtype=torch.float64),
            torch.arange(len(target) + 1),
            float(tau),
        )
    )


def by_definition(target: Sequence[Fraction], draft: Sequence[Fraction], tau: Fraction) -> int:
    """The published rule, in exact arithmetic."""
    passing = [
        i
        for i, (p, q) in enumerate(zip(target, draft, strict=True), 1)
        if min(Fraction(1), p / q) > tau
    ]
    return max(passing, default=0)


def until_one_fails(target: Sequence[Fraction], draft: Sequence[Fraction], tau: Fraction) -> int:
    """Wrong: an early prefix that fails blocks the later ones."""
    ratios = [min(Fraction(1), p / q) for p, q in zip(target, draft, strict=True)]
    return len(list(itertools.takewhile(lambda ratio: ratio > tau, ratios)))


def token_by_token(target: Sequence[Fraction], draft: Sequence[Fraction], tau: Fraction) -> int:
    """Wrong: the ratio of the last token instead of that of all."""

    def last(joint: Sequence[Fraction]) -> list[Fraction]:
        return [p / before for p, before in zip(joint, [Fraction(1), *joint], strict=False)]

    return by_definition(last(target), last(draft), tau)


def turned_around(target: Sequence[Fraction], draft: Sequence[Fraction], tau: Fraction) -> int:
    """Wrong: Q / P."""
    return by_definition(draft, target, tau)


def cases() -> list[tuple[list[Fraction], list[Fraction]]]:
    """P and Q of all drafts after all pairs of tokens."""
    return [
        (joint(target, text, drafts), joint(drafter, text, drafts))
        for text in itertools.product(range(VOCABULARY), repeat=2)
        for drafts in itertools.product(range(VOCABULARY), repeat=DRAFTS)
    ]


def test_it_is_the_published_rule() -> None:
    """The same number of drafts as by exact arithmetic, over all cases and thresholds."""
    found = set()
    for (p, q), tau in itertools.product(cases(), THRESHOLDS):
        assert all(a / b != tau for a, b in zip(p, q, strict=True)) or tau == 1
        assert accepted(p, q, tau) == by_definition(p, q, tau)
        found.add(accepted(p, q, tau))
    assert found == {0, 1, 2, 3}


@pytest.mark.parametrize("wrong", [until_one_fails, token_by_token, turned_around])
def test_other_rules_are_seen(wrong: Accept) -> None:
    """The cases tell the published rule from those that it may be mistaken for."""
    assert any(wrong(p, q, tau) != accepted(p, q, tau) for (p, q) in cases() for tau in THRESHOLDS)


def test_a_ratio_of_tau_is_not_enough() -> None:
    """The rule says greater; powers of two have no rounding here."""
    half, quarter = Fraction(1, 2), Fraction(1, 4)
    assert accepted([quarter], [half], half) == 0
    assert accepted([half], [half], half) == 1


def committed(
    accept: Accept,
    tau: Fraction,
    drafter: Callable[[Text], list[Fraction]] = drafter,
    residual: bool = False,
) -> Law:
    """The law of texts of `LENGTH` tokens after two, with drafts drawn token by token.

    Args:
        accept: how many drafts are kept.
        tau: the threshold.
        drafter: what drafts are drawn from.
        residual: take the extra token from what speculative sampling would, which is wrong here.
    """

    @functools.cache
    def after(last: Text, length: int) -> Law:
        """The law of so many tokens more; all models look at the last two."""
        law: Law = {}
        for drafts in itertools.product(range(VOCABULARY), repeat=2):
            q = joint(drafter, last, drafts)
            kept = accept(joint(target, last, drafts), q, tau)
            begin = last + drafts[:kept]
            extra = target(begin)
            if residual and kept < len(drafts):
                above = [
                    max(p - d, Fraction(0)) for p, d in zip(extra, drafter(begin), strict=True)
                ]
                extra = [part / sum(above) for part in above] if sum(above) else extra
            for token, share in enumerate(extra):
                block = (*drafts[:kept], token)[:length]
                left = length - len(block)
                rest = after((*last, *block)[-2:], left) if left else {(): Fraction(1)}
                for more, chance in rest.items():
                    whole = block + more
                    law[whole] = law.get(whole, Fraction(0)) + q[-1] * share * chance
        return {text: chance for text, chance in law.items() if chance}

    return after((0, 1), LENGTH)


def plain() -> Law:
    """The law of texts sampled from the target token by token."""
    texts = itertools.product(range(VOCABULARY), repeat=LENGTH)
    return {text: joint(target, (0, 1), text)[-1] for text in texts}


def test_j1_tau_one_is_plain_sampling() -> None:
    """Nothing is kept and the extra token is the target's: exactly its law; a residual is not."""
    assert committed(accepted, Fraction(1)) == plain()
    assert committed(accepted, Fraction(1), residual=True) != plain()


def test_between_the_thresholds_it_is_lossy() -> None:
    """No exactness is claimed for other tau, and there is none."""
    assert committed(accepted, Fraction(1, 2)) != plain()


def test_j2_tau_zero_keeps_all_drafts() -> None:
    """Blocks are the drafter's, with a token of the target after each."""
    assert all(accepted(p, q, Fraction(0)) == DRAFTS for p, q in cases())
    law = committed(accepted, Fraction(0))
    marginal = sum((chance for text, chance in law.items() if text[0] == 2), Fraction(0))
    assert marginal == drafter((0, 1))[2] != target((0, 1))[2]


def test_j2_tau_zero_keeps_even_what_the_target_never_says() -> None:
    """Top-k and top-p may give a draft no probability: any other tau keeps no path through it."""
    scores = torch.tensor([-torch.inf, 0.0, -1.0, -2.0]).roll(-1)
    impossible = torch.tensor([0.0, -1.0, -torch.inf, -torch.inf])
    depths = torch.tensor([0, 1, 2, 2])
    assert int(accept_joint(impossible, scores, depths, 0.0)) == 2  # node 3 is none
    assert int(accept_joint(impossible, scores, depths, 1e-9)) == 1


def test_j3_a_larger_tau_keeps_no_more() -> None:
    """For fixed drafts."""
    for p, q in cases():
        kept = [accepted(p, q, tau) for tau in THRESHOLDS]
        assert kept == sorted(kept, reverse=True)


def test_j4_the_targets_own_drafts_are_kept() -> None:
    """The ratio is 1: all are, for any tau below, and the law is the target's."""
    nearly = Fraction(999, 1000)
    assert all(accepted(p, p, nearly) == DRAFTS for p, _ in cases())
    assert committed(accepted, nearly, drafter=target) == plain()


def test_j6_a_prefix_that_fails_does_not_block_a_longer_one() -> None:
    """The first of three fails and the third passes: three are kept; a rule that stops fails."""
    p = [Fraction(1, 10), Fraction(9, 100), Fraction(8, 100)]
    q = [Fraction(1, 2), Fraction(1, 4), Fraction(1, 10)]
    assert accepted(p, q, Fraction(1, 2)) == 3
    assert until_one_fails(p, q, Fraction(1, 2)) == 0


def test_j8_what_is_kept_is_likely_enough() -> None:
    """P > tau * Q of every kept path; with the ratio turned around it would not be."""

    def holds(accept: Accept) -> bool:
        return all(
            p[kept - 1] > tau * q[kept - 1]
            for (p, q), tau in itertools.product(cases(), THRESHOLDS)
            if (kept := accept(p, q, tau))
        )

    assert holds(accepted)
    assert not holds(turned_around)


def test_candidates_are_held_against_the_likeliest_of_their_depth() -> None:
    """Over random trees: the deepest node that passes, of those the likeliest under the target."""
    chance = random.Random(3)
    depths_found = set()
    for _ in range(400):
        depths = [0, *sorted(chance.randint(1, 3) for _ in range(6))]
        p = [Fraction(1), *(Fraction(chance.randint(1, 97), 97) for _ in range(6))]
        q = [Fraction(1), *(Fraction(chance.randint(1, 89), 89) for _ in range(6))]
        there = [True, *(chance.random() < 0.8 for _ in range(6))]
        tau = chance.choice(THRESHOLDS)
        passing = [(0, Fraction(1), 0)]
        for node in range(1, 7):
            rivals = [q[n] for n in range(7) if depths[n] == depths[node] and there[n]]
            if there[node] and min(Fraction(1), p[node] / max(rivals)) > tau:
                passing.append((depths[node], p[node], -node))
        scores = [math.log(s) if here else -math.inf for s, here in zip(q, there, strict=True)]
        inputs = torch.tensor([list(map(math.log, p)), scores], dtype=torch.float64)
        before = inputs.clone()
        found = int(accept_joint(inputs[0], inputs[1], torch.tensor(depths), float(tau)))
        assert found == -max(passing)[2]
        assert torch.equal(inputs, before)  # the published code changes what it is given
        depths_found.add(depths[found])
    assert depths_found == {0, 1, 2, 3}


def test_rows_are_decided_each_for_itself() -> None:
    """A batch of cases gives what each of them gives alone."""
    some = cases()[:40]
    logs = [[[0.0, *map(math.log, part)] for part in case] for case in some]
    both = torch.tensor(logs, dtype=torch.float64)
    kept = accept_joint(both[:, 0], both[:, 1], torch.arange(DRAFTS + 1), 0.5)
    assert kept.tolist() == [accepted(p, q, Fraction(1, 2)) for p, q in some]
