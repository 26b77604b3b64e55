"""Distributions as transformers makes them, and tokens drawn from them."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model.decoding.generation import generate
from model.decoding.sampling import RowSampling, RowUniforms, Sampling, draw, penalize
from tests.support.tiny_model import (
    head_logits,
    tiny_config,
    tiny_model,
    tiny_network,
    tiny_prompts,
)

CASES = [
    Sampling(temperature=0.7),
    Sampling(temperature=1.0, top_k=5),
    Sampling(temperature=1.0, top_k=500),
    Sampling(temperature=1.3, top_p=0.8),
    Sampling(temperature=1.0, top_p=0.01),
    Sampling(temperature=1.0, min_p=0.1),
    Sampling(temperature=0.9, top_k=12, top_p=0.9, min_p=0.05, repetition_penalty=1.4),
]


def distribution(logits: torch.Tensor, *samplings: Sampling) -> torch.Tensor:
    """What is drawn from `[B, V]` logits, by one sampling for all rows or one for each."""
    each = samplings if len(samplings) > 1 else samplings * len(logits)
    return RowSampling(each, logits.device).chosen_from(logits.unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize("sampling", CASES)
def test_distributions_are_those_of_transformers(sampling: Sampling) -> None:
    """All filters, alone and together, keep the same tokens with the same probabilities."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(40, 30, generator=generator)
    text = torch.randint(30, (40, 6), generator=generator)
    warpers = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)])
    warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    expected = torch.softmax(warpers(text, logits.clone()), dim=-1)
    seen = torch.zeros(40, 30, dtype=torch.bool).scatter(1, text, True)
    penalized = penalize(logits, seen, sampling.repetition_penalty)
    found = distribution(penalized, sampling)
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected)
    assert (found != distribution(logits, Sampling(temperature=1.1))).any()


def test_a_row_has_its_own_distribution_in_any_company() -> None:
    """Rows of every sampling, greedy ones among them, get the bits that they get alone."""
    samplings = [*CASES, Sampling(), Sampling(temperature=2.0), Sampling(top_k=3)]
    logits = 2 * torch.randn(len(samplings), 30, generator=torch.Generator().manual_seed(0))
    together = distribution(logits, *samplings)
    for row, sampling in enumerate(samplings):
        assert torch.equal(together[row], distribution(logits[row : row + 1], sampling)[0])
        if sampling.greedy:
            assert int(together[row].argmax()) == int(logits[row].argmax())
            assert sorted(set(together[row].tolist())) == [0, 1]


@pytest.mark.parametrize("sampling", [Sampling(), *CASES])
def test_logarithms_are_those_of_the_distributions(sampling: Sampling) -> None:
    """Of what is kept, and minus infinity of the rest; of greedy rows as the model says."""
    logits = 2 * torch.randn(40, 1, 30, generator=torch.Generator().manual_seed(0))
    rows = RowSampling([sampling] * 40, logits.device)
    expected = rows.distributions(logits)
    found = rows.log_distributions(logits)
    assert torch.equal(found > -torch.inf, expected > 0)
    torch.testing.assert_close(found.exp(), expected)


def test_logarithms_reach_below_the_smallest_number() -> None:
    """At a low temperature a probability is 0 in fp32; its logarithm is a number."""
    logits = torch.tensor([[[0.0, -3.0]]])
    rows = RowSampling([Sampling(temperature=0.01)], logits.device)
    assert rows.distributions(logits)[0, 0, 1] == 0
    assert rows.log_distributions(logits)[0, 0].tolist() == pytest.approx([0, -300])


def test_draws_divide_the_line_by_probability() -> None:
    """Each token has as much of [0, 1) as its probability, and one without any has none."""
    probabilities = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    numbers = torch.linspace(0, 1, 4001, dtype=torch.float64)[:-1]
    tokens = draw(probabilities.expand(len(numbers), -1), numbers)
    assert torch.bincount(tokens, minlength=6).tolist() == [0, 1000, 0, 2000, 1000, 0]
    last = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert draw(probabilities.unsqueeze(0), last).tolist() == [4]
    assert draw(3 * probabilities.unsqueeze(0), torch.zeros(1)).tolist() == [1]


def test_rows_keep_their_numbers() -> None:
    """A row's numbers depend on its seed alone, not on who is beside it, leaves, or asks."""
    device = torch.device("cpu")
    alone = RowUniforms([5], device)
    expected = torch.cat([alone.next(3) for _ in range(200)], dim=1)[0]
    together = RowUniforms([4, 5, 6], device)
    first = [together.next(7)[1] for _ in range(40)]
    together.keep([2, 1])
    later = [together.next(5)[1] for _ in range(60)]
    found = torch.cat([*first, *later])
    assert torch.equal(found, expected[: len(found)])
    assert float(expected.min()) >= 0
    assert float(expected.max()) < 1
    assert abs(float(expected.mean()) - 0.5) < 0.06  # five standard deviations of 600 numbers


def test_rows_that_join_keep_their_numbers() -> None:
    """At any time, whoever has used more of them."""
    device = torch.device("cpu")
    for used, later in ((0, 3), (250, 0), (3, 700), (300, 5)):
        expected = [RowUniforms([seed], device).next(2000)[0] for seed in (5, 6)]
        uniforms, other = RowUniforms([5], device), RowUniforms([6], device)
        for count in (used, used // 3):
            uniforms.next(count)
        other.next(later)
        uniforms.join(other)
        found = torch.cat([uniforms.next(7) for _ in range(100)], dim=1)
        assert torch.equal(found[0], expected[0][used + used // 3 :][:700])
        assert torch.equal(found[1], expected[1][later:][:700])


@pytest.mark.parametrize("heads", [1, 3, 4])
def test_a_penalty_counts_what_is_drafted_before(heads: int) -> None:
    """Greedy text under a repetition penalty is the one that is chosen token by token."""
    model, penalty = tiny_model(tiny_config()), 1.6
    found = generate(
        tiny_network(tiny_config()),
        tiny_prompts(),
        heads=heads,
        max_new_tokens=24,
        sampling=Sampling(repetition_penalty=penalty),
    )
    free = generate(tiny_network(tiny_config()), tiny_prompts(), heads=heads, max_new_tokens=24)
    assert found.tokens != free.tokens
    for prompt, tokens in zip(tiny_prompts(), found.tokens, strict=True):
        text = list(prompt)
        for token in tokens:
            logits = head_logits(model, torch.tensor([text]))[0, 0, -1]
            seen = torch.zeros(20, dtype=torch.bool)
            seen[text] = True
            assert int(penalize(logits, seen, penalty).argmax()) == token
            text.append(token)


def test_numbers_are_copied_to_the_device_many_at_a_time() -> None:
    """On a GPU each copy would make a decoding step wait for the device."""
    uniforms = RowUniforms([1, 2], torch.device("meta"))
    copied = [uniforms.next(4)._base for _ in range(20)]
    assert copied[0] is not None
    assert all(each is copied[0] for each in copied)
