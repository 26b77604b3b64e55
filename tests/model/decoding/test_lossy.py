"""Lossy rules: what they keep, where they are exact after all, and that they are not in general."""

import math

import pytest
import torch

from model.decoding.acceptance import accept_top_k, accept_typical
from model.decoding.generation import Generation, collect, generate, stream
from model.decoding.lossy import LossyDecoder, LossyRule
from model.decoding.sampling import Sampling
from tests.support.tiny_model import tiny_config, tiny_network, tiny_prompts


def decode(rule: LossyRule, temperature: float = 0.0, heads: int = 4) -> Generation:
    """Continue the tiny prompts by 24 tokens."""
    decoder = LossyDecoder(
        tiny_network(tiny_config()),
        heads=heads,
        rule=rule,
        sampling=Sampling(temperature=temperature),
        logprobs=True,
    )
    pieces = stream(decoder, tiny_prompts(), max_new_tokens=24)
    return collect(pieces, len(tiny_prompts()))


def test_top_k_keeps_drafts_among_the_likeliest() -> None:
    """By rank, up to the first that is not."""
    logits = torch.tensor([[[3.0, 2.0, 1.0, 0.0]] * 4])
    drafts = torch.tensor([[0, 1, 2]])
    assert [int(accept_top_k(logits, drafts, k)) for k in (1, 2, 3)] == [1, 2, 3]
    assert int(accept_top_k(logits, torch.tensor([[3, 0, 0]]), 3)) == 0


def test_typical_keeps_what_is_likely_for_its_entropy() -> None:
    """A sure head 1 wants likely drafts; an unsure one takes any that is as likely as others."""
    flat = torch.full((10,), 0.1)
    sure = torch.tensor([0.92, 0.05, *[0.00375] * 8])
    target = torch.stack([flat, sure, sure]).unsqueeze(0)
    least_flat = 0.3 * math.exp(-math.log(10))
    assert least_flat < 0.1
    assert int(accept_typical(target, torch.tensor([[7, 0]]), 0.09, 0.3)) == 2
    assert int(accept_typical(target, torch.tensor([[7, 1]]), 0.09, 0.3)) == 1
    assert int(accept_typical(target, torch.tensor([[7, 1]]), 0.04, 0.3)) == 2
    assert int(accept_typical(target, torch.tensor([[7, 0]]), 1.0, 1.1)) == 0


def test_the_strictest_rules_are_greedy_exact() -> None:
    """Top-1, and a typical rule that keeps nothing."""
    expected = generate(tiny_network(tiny_config()), tiny_prompts(), heads=1, max_new_tokens=24)
    assert decode(LossyRule(top_k=1)).tokens == expected.tokens
    never = decode(LossyRule(epsilon=1.0, delta=math.inf))
    assert never.tokens == expected.tokens
    assert never.tokens_per_forward == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_looser_rules_keep_more_and_change_the_text(temperature: float) -> None:
    """All drafts are kept by the loosest; head 1 likes the text less."""
    exact = decode(LossyRule(top_k=1), temperature)
    some = decode(LossyRule(top_k=5), temperature)
    every = decode(LossyRule(top_k=20), temperature)
    typical = decode(LossyRule(epsilon=0.01, delta=0.05), temperature)
    assert exact.tokens_per_forward < some.tokens_per_forward < every.tokens_per_forward
    assert typical.tokens_per_forward > 1.2
    assert every.forwards == 1 + -(-23 // 4)
    assert exact.tokens != some.tokens != every.tokens

    def liking(found: Generation) -> float:
        assert found.logprobs is not None
        return sum(map(sum, found.logprobs)) / found.num_tokens

    assert liking(every) < liking(exact) - 0.5
    assert decode(LossyRule(), temperature).tokens == decode(LossyRule(), temperature).tokens
