"""Chains of drafts: the same tokens, or the same distribution, as head 1 alone gives."""

import functools
import itertools

import pytest
import torch
from torch import Tensor

from model.decoding.chain import ChainDecoder
from model.decoding.generation import Generation, collect, generate, stream
from model.decoding.sampling import Sampling
from model.errors import CheckpointError
from model.inference.network import Network
from model.inference.prefill import prefill
from model.language_model import MultiTokenModel
from tests.support.perfect_drafts import PerfectChain, PerfectDrafts, copies_of_head_1
from tests.support.tiny_model import (
    greedy_continuation,
    head_logits,
    tiny_config,
    tiny_model,
    tiny_network,
    tiny_prompts,
)

HEADS = [1, 2, 3, 4]
NUM_TOKENS = 28


@functools.cache
def training_form() -> MultiTokenModel:
    """A model whose heads know nothing, so that most drafts are wrong."""
    return tiny_model(tiny_config())


@functools.cache
def network() -> Network:
    """The same model for decoding."""
    return tiny_network(tiny_config())


@functools.cache
def references() -> list[list[int]]:
    """Plain greedy continuations of the tiny prompts, by training's form without a cache."""
    return [greedy_continuation(training_form(), prompt, NUM_TOKENS) for prompt in tiny_prompts()]


def with_perfect_drafts(
    heads: int, num_tokens: int, eos_id: int | None = None, only: int | None = None
) -> Generation:
    """Continue all prompts with drafts that are always right, or right in one row only."""
    texts = [
        p + r if only in (None, row) else []
        for row, (p, r) in enumerate(zip(tiny_prompts(), references(), strict=True))
    ]
    decoder = PerfectChain(PerfectDrafts(network(), texts), heads=heads)
    pieces = stream(decoder, tiny_prompts(), max_new_tokens=num_tokens, eos_id=eos_id)
    return collect(pieces, len(tiny_prompts()))


def cut(tokens: list[int], eos_id: int) -> list[int]:
    """Tokens up to the first end of text."""
    return tokens[: tokens.index(eos_id) + 1] if eos_id in tokens else tokens


@pytest.mark.parametrize("heads", HEADS)
def test_greedy_equals_plain_decoding(heads: int) -> None:
    """Any number of heads gives head 1's own tokens, prompt by prompt and in a ragged batch."""
    batch = generate(network(), tiny_prompts(), heads=heads, max_new_tokens=NUM_TOKENS)
    assert batch.tokens == references()
    for prompt, expected in zip(tiny_prompts(), references(), strict=True):
        alone = generate(network(), [prompt], heads=heads, max_new_tokens=NUM_TOKENS)
        assert alone.tokens == [expected]


@pytest.mark.parametrize("heads", HEADS)
def test_end_of_text_ends_a_row_and_no_other(heads: int) -> None:
    """Each text stops at its first end of text; those that have none go on unharmed."""
    eos_id = references()[0][6]
    expected = [cut(tokens, eos_id) for tokens in references()]
    lengths = {len(tokens) for tokens in expected}
    assert len(lengths) > 1, "texts should end at different positions"
    found = generate(
        network(), tiny_prompts(), heads=heads, max_new_tokens=NUM_TOKENS, eos_id=eos_id
    )
    assert found.tokens == expected


@pytest.mark.parametrize("num_tokens", range(1, 10))
def test_limit_inside_a_block(num_tokens: int) -> None:
    """Exactly the asked number of tokens comes, wherever in a block of right drafts it ends."""
    expected = [tokens[:num_tokens] for tokens in references()]
    assert with_perfect_drafts(4, num_tokens).tokens == expected
    found = generate(network(), tiny_prompts(), heads=4, max_new_tokens=num_tokens)
    assert found.tokens == expected


@pytest.mark.parametrize("position", range(1, 9))
def test_end_of_text_inside_a_block(position: int) -> None:
    """With right drafts the end of text falls on every position of a block; the rest goes."""
    eos_id = references()[2][position]
    found = with_perfect_drafts(4, NUM_TOKENS, eos_id)
    assert found.tokens == [cut(tokens, eos_id) for tokens in references()]


@pytest.mark.parametrize("num_tokens", range(2, 8))
def test_a_row_that_ends_early_leaves_the_others_alone(num_tokens: int) -> None:
    """The longest text ends with right drafts to spare and leaves; the others go on."""
    longest = max(range(len(tiny_prompts())), key=lambda index: len(tiny_prompts()[index]))
    found = with_perfect_drafts(4, num_tokens, only=longest)
    assert found.tokens == [tokens[:num_tokens] for tokens in references()]
    assert len(found.blocks[longest]) == 1 + -(-(num_tokens - 1) // 4)


def test_rows_that_have_ended_leave_the_batch() -> None:
    """Each forward computes the rows that are not finished, and those alone."""
    sizes = []

    class Counted(Network):
        """Notes the rows of each forward of the trunk."""

        def trunk(self, tokens: Tensor, *rest: object) -> Tensor:
            sizes.append(len(tokens))
            return super().trunk(tokens, *rest)  # type: ignore[arg-type]

    eos_id = references()[0][6]
    found = generate(
        Counted(network().config, network().weights),
        tiny_prompts(),
        heads=2,
        max_new_tokens=NUM_TOKENS,
        eos_id=eos_id,
    )
    taking_part = [
        sum(len(blocks) > forward for blocks in found.blocks) for forward in range(found.forwards)
    ]
    assert sizes == taking_part
    assert sizes[0] > sizes[-1]


def test_heads_that_copy_head_1_do_no_harm() -> None:
    """Drafts that are plausible and at the wrong position are still verified."""
    model = tiny_model(tiny_config(), copies_of_head_1())
    copies = tiny_network(tiny_config(), copies_of_head_1())
    tokens = torch.tensor([tiny_prompts()[-1]])
    assert torch.equal(head_logits(model, tokens)[0], head_logits(model, tokens)[3])
    plain = [greedy_continuation(model, p, NUM_TOKENS) for p in tiny_prompts()]
    for heads in HEADS:
        found = generate(copies, tiny_prompts(), heads=heads, max_new_tokens=NUM_TOKENS)
        assert found.tokens == plain


@pytest.mark.parametrize("heads", HEADS)
def test_forwards_add_up(heads: int) -> None:
    """Every forward gives a text 1 to k tokens, the prompt's gives 1, and nothing is lost."""
    found = generate(network(), tiny_prompts(), heads=heads, max_new_tokens=NUM_TOKENS)
    for blocks in found.blocks:
        sizes = [len(block) for block in blocks]
        assert sizes[0] == 1
        assert sum(sizes) == NUM_TOKENS
        assert all(1 <= size <= heads for size in sizes)
    assert found.forwards == max(len(blocks) for blocks in found.blocks)
    assert found.num_tokens == NUM_TOKENS * len(tiny_prompts())
    assert 1 <= found.tokens_per_forward <= heads


@pytest.mark.parametrize("heads", HEADS)
def test_right_drafts_give_k_tokens_per_forward(heads: int) -> None:
    """With right drafts N tokens take 1 + ceil((N - 1) / k) forwards, k tokens in each."""
    num_tokens = 25  # one from the prompt's forward, then a multiple of each k
    found = with_perfect_drafts(heads, num_tokens)
    assert found.forwards == 1 + (num_tokens - 1) // heads
    assert found.tokens_per_forward == heads
    assert with_perfect_drafts(heads, num_tokens + 1).forwards == 1 + -(-num_tokens // heads)


def test_cache_after_refused_drafts_is_that_of_a_fresh_prefill() -> None:
    """Whatever was accepted, and whichever rows have left, the cache is what the texts give."""
    decoder = ChainDecoder(network(), heads=4)
    texts = [list(prompt) for prompt in tiny_prompts()]
    rows = list(range(len(texts)))
    step = decoder.prefill(tiny_prompts(), 40)
    refused = False
    for number in range(12):
        for row, new in zip(rows, step.tokens, strict=True):
            texts[row].extend(new)
        if number in (4, 8):  # a row in the middle leaves, the last one takes its place
            order = [0, len(rows) - 1, *range(2, len(rows) - 1)]
            decoder.keep(order)
            rows = [rows[place] for place in order]
        check_cache(decoder, [texts[row] for row in rows])
        step = decoder.step()
        refused |= any(len(new) < 4 for new in step.tokens)
    assert refused
    assert len(rows) == len(texts) - 2


def check_cache(decoder: ChainDecoder, texts: list[list[int]]) -> None:
    """Keys and values of each row are those of its text, but for the last token, still unread."""
    for place, text in enumerate(texts):
        length = len(text) - 1
        assert int(decoder.cache.lengths[place]) == length
        fresh = network().new_cache(1, 64)
        with torch.no_grad():
            prefill(network(), fresh, torch.tensor([text[:-1]]), torch.tensor([length]), 4)
        for kept, expected in zip(decoder.cache.buffers, fresh.buffers, strict=True):
            torch.testing.assert_close(kept[place, :length], expected[0, :length])


def chi_square(counts: Tensor, distribution: Tensor) -> float:
    """Distance of counts from a distribution, in standard deviations of chi-square."""
    expected = distribution * counts.sum()
    enough = expected >= 5
    counts = torch.cat([counts[enough], counts[~enough].sum().unsqueeze(0)])
    expected = torch.cat([expected[enough], expected[~enough].sum().unsqueeze(0)])
    degrees = len(counts) - 1
    statistic = ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    return float((statistic - degrees) / (2 * degrees) ** 0.5)


@pytest.mark.parametrize("heads", [1, 3])
def test_sampled_texts_follow_the_model(heads: int) -> None:
    """Counts of 10,000 sampled texts fit the model at that temperature and at no other."""
    config = tiny_config(vocab_size=5, future_tokens=3)
    model = tiny_model(config)
    found = generate(
        tiny_network(config),
        [[1, 2]] * 10_000,
        heads=heads,
        max_new_tokens=3,
        sampling=Sampling(temperature=1.5),
    )
    codes = torch.tensor(found.tokens) @ torch.tensor([25, 5, 1])
    counts = torch.bincount(codes, minlength=125).double()

    def distribution(temperature: float) -> Tensor:
        texts = list(itertools.product(range(5), repeat=3))
        logits = head_logits(model, torch.tensor([[1, 2, *text] for text in texts]))[0, :, 1:4]
        distributions = torch.softmax(logits / temperature, dim=-1)
        return distributions.gather(2, torch.tensor(texts).unsqueeze(2)).prod(1).squeeze(1)

    assert abs(chi_square(counts, distribution(1.5))) < 5
    assert chi_square(counts, distribution(1.9)) > 10
    assert heads == 1 or found.tokens_per_forward > 1


def sample(seeds: list[int], prompts: list[list[int]], temperature: float) -> list[list[int]]:
    """Sampled texts of four heads."""
    return generate(
        network(),
        prompts,
        heads=4,
        max_new_tokens=20,
        sampling=Sampling(temperature=temperature),
        seeds=seeds,
    ).tokens


def test_a_row_is_sampled_by_its_own_seed() -> None:
    """A text repeats with its seed, alone or in any company; another seed gives another text."""
    prompts, seeds = tiny_prompts(), [7, 8, 9, 10, 11]
    texts = sample(seeds, prompts, 1.0)
    assert texts == sample(seeds, prompts, 1.0)
    assert sample(seeds[::-1], prompts[::-1], 1.0) == texts[::-1]
    for prompt, seed, text in zip(prompts, seeds, texts, strict=True):
        assert sample([seed], [prompt], 1.0) == [text]
        assert sample([seed + 100], [prompt], 1.0) != [text]
    assert sample(seeds, prompts, 1e-4) == [tokens[:20] for tokens in references()]


def test_logprobs_are_those_of_head_1() -> None:
    """Of each token, given all before it, whatever forward it came from."""
    for sampling in (Sampling(), Sampling(temperature=1.3, repetition_penalty=1.2)):
        found = generate(
            network(),
            tiny_prompts(),
            heads=3,
            max_new_tokens=15,
            sampling=sampling,
            logprobs=True,
        )
        assert found.logprobs is not None
        for prompt, tokens, logprobs in zip(
            tiny_prompts(), found.tokens, found.logprobs, strict=True
        ):
            logits = head_logits(training_form(), torch.tensor([prompt + tokens]))[0, 0]
            every = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
            expected = every.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
            torch.testing.assert_close(torch.tensor(logprobs), expected.float())


def test_logits_that_are_not_finite_are_not_drawn_from() -> None:
    """Of weights that are not numbers, or at a temperature that makes them infinite."""
    for weight, temperature in ((float("nan"), 1.0), (float("inf"), 1.0), (1.0, 1e-320)):
        damaged = tiny_network(tiny_config())
        damaged.weights.norm.mul_(weight)
        with pytest.raises(CheckpointError, match="logits are not finite"):
            generate(
                damaged,
                tiny_prompts(),
                heads=4,
                max_new_tokens=4,
                sampling=Sampling(temperature=temperature),
            )
