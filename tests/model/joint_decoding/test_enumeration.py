"""Exact joint decoding: against all blocks, each read by itself."""

import functools
import itertools

import pytest
import torch
from torch import Tensor

from model.decoding.generation import collect, generate, stream
from model.decoding.sampling import GREEDY, Sampling
from model.inference.prefill import prefill
from model.joint_decoding.draft_model import JointModelDecoder
from model.joint_decoding.enumeration import MOST_BEGINNINGS, ExactJointDecoder
from model.joint_decoding.rule import JointRule
from tests.model.decoding.test_chain import chi_square
from tests.support.tiny_model import tiny_config, tiny_network, tiny_prompts

VOCABULARY, EOS, BLOCK = 5, 3, 3
NETWORK = functools.cache(lambda: tiny_network(tiny_config(vocab_size=VOCABULARY)))


@functools.cache
@torch.no_grad()
def said(text: tuple[int, ...]) -> Tensor:
    """Logarithmic probabilities `[V]` after a text that is read anew."""
    network = NETWORK()
    cache = network.new_cache(1, len(text))
    logits = prefill(network, cache, torch.tensor([text]), torch.tensor([len(text)]), 1)
    return torch.log_softmax(logits[0, 0], dim=-1)


def likelihood(text: tuple[int, ...], block: tuple[int, ...]) -> float:
    """Logarithmic joint probability of a block after a text."""
    return sum(float(said(text + block[:i])[token]) for i, token in enumerate(block))


def blocks_after(text: tuple[int, ...], eos_id: int | None) -> dict[tuple[int, ...], float]:
    """All blocks of `BLOCK` tokens, or of fewer that end with an end of text."""
    blocks = set()
    for block in itertools.product(range(VOCABULARY), repeat=BLOCK):
        length = block.index(eos_id) + 1 if eos_id is not None and eos_id in block else BLOCK
        blocks.add(block[:length])
    return {block: likelihood(text, block) for block in blocks}


@pytest.mark.parametrize("eos_id", [None, EOS])
def test_j5_blocks_are_the_likeliest_of_all(eos_id: int | None) -> None:
    """Each is the best of all, and so never less likely than what head 1 gives token by token."""
    decoder = ExactJointDecoder(NETWORK(), block=BLOCK, eos_id=eos_id)
    prompts = tiny_prompts(VOCABULARY)[:3]
    found = collect(stream(decoder, prompts, max_new_tokens=9, eos_id=eos_id), len(prompts))
    better = 0
    for prompt, blocks in zip(prompts, found.blocks, strict=True):
        text = tuple(prompt)
        for block in blocks:
            every = blocks_after(text, eos_id)
            assert tuple(block) == max(every, key=lambda b: every[b])
            plain = generate(
                NETWORK(), [list(text)], heads=1, max_new_tokens=BLOCK, eos_id=eos_id
            ).tokens[0]
            assert likelihood(text, tuple(block)) >= every[tuple(plain)] - 1e-9
            better += block != plain
            text += tuple(block)
    assert better > 0


def test_j5_a_full_beam_of_the_target_finds_the_best_block() -> None:
    """Drafts of the model itself, of V ** g beams: the best is kept, and is the exact block."""
    prompts = tiny_prompts(VOCABULARY)
    rule = JointRule(VOCABULARY**BLOCK, 1, 0.999)
    way = JointModelDecoder(NETWORK(), drafter=NETWORK(), drafts=BLOCK, rule=rule)
    firsts = way.prefill(prompts, 8).tokens
    drafted = [tokens[:-1] for tokens in way.step().tokens]
    begun = [prompt + first for prompt, first in zip(prompts, firsts, strict=True)]
    assert drafted == ExactJointDecoder(NETWORK(), block=BLOCK).prefill(begun, 8).tokens


def test_blocks_of_one_token_are_plain_decoding() -> None:
    """Greedily, with and without an end of text, and with probabilities of tokens."""
    prompts = tiny_prompts(VOCABULARY)
    for eos_id in (None, EOS):
        plain = generate(
            NETWORK(), prompts, heads=1, max_new_tokens=9, eos_id=eos_id, logprobs=True
        )
        way = ExactJointDecoder(NETWORK(), block=1, eos_id=eos_id, logprobs=True)
        found = collect(stream(way, prompts, max_new_tokens=9, eos_id=eos_id), len(prompts))
        assert found.tokens == plain.tokens
        assert found.logprobs is not None
        assert plain.logprobs is not None
        for one, other in zip(found.logprobs, plain.logprobs, strict=True):
            assert one == pytest.approx(other)


def test_probabilities_of_tokens_are_those_along_the_block() -> None:
    """Those that head 1 gives when the text is read anew."""
    prompts = tiny_prompts(VOCABULARY)
    way = ExactJointDecoder(NETWORK(), block=BLOCK, eos_id=EOS, logprobs=True)
    found = collect(stream(way, prompts, max_new_tokens=9, eos_id=EOS), len(prompts))
    assert found.logprobs is not None
    for prompt, tokens, logprobs in zip(prompts, found.tokens, found.logprobs, strict=True):
        assert sum(logprobs) == pytest.approx(likelihood(tuple(prompt), tuple(tokens)), abs=1e-5)


def test_drawn_blocks_have_the_law_of_plain_sampling() -> None:
    """Counts of 1,500 texts fit the product of the model's distributions, warped as asked."""
    sampling = Sampling(temperature=1.4, top_k=4)
    way = ExactJointDecoder(NETWORK(), block=2, sampling=sampling)
    found = collect(stream(way, [[1, 2]] * 1500, max_new_tokens=3), 1500)

    def warped(text: tuple[int, ...]) -> Tensor:
        scaled = said(text) / 1.4
        least = scaled.topk(4).values[-1]
        return torch.softmax(scaled.masked_fill(scaled < least, -torch.inf), dim=-1)

    law = torch.zeros(VOCABULARY, VOCABULARY, VOCABULARY, dtype=torch.float64)
    for a, b in itertools.product(range(VOCABULARY), repeat=2):
        law[a, b] = warped((1, 2))[a] * warped((1, 2, a))[b] * warped((1, 2, a, b))
    codes = torch.tensor(found.tokens) @ torch.tensor([25, 5, 1])
    counts = torch.bincount(codes, minlength=125).double()
    assert abs(chi_square(counts, law.flatten())) < 5
    assert chi_square(counts, (law**2 / (law**2).sum()).flatten()) > 10


def test_greedy_rows_beside_drawn_ones_are_as_alone() -> None:
    """A batch with both; the greedy row's blocks stay the likeliest."""
    prompts = tiny_prompts(VOCABULARY)[:2]
    way = ExactJointDecoder(NETWORK(), block=2)
    expected = way.prefill(prompts, 8).tokens[0]
    rows = way.options(2)
    way.open(2, 40)
    step = way.join(prompts, [rows[0]._replace(sampling=GREEDY), rows[1]])
    assert step.tokens[0] == expected
    way.open(2, 40)
    drawn = rows[1]._replace(sampling=Sampling(temperature=5.0))
    assert way.join(prompts, [rows[0], drawn]).tokens[0] == expected


def test_its_cost_is_bounded() -> None:
    """More beginnings of blocks than it says are not enumerated."""
    assert VOCABULARY**5 > MOST_BEGINNINGS
    with pytest.raises(AssertionError, match="6"):
        ExactJointDecoder(NETWORK(), block=6)
