"""Self-speculative decoding: the same tokens, or the same distribution, as head 1 alone gives."""

import functools
import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from model.decoding.kv_cache import KVCache
from model.decoding.self_speculative import Decoder, Generation, accept_chain, generate
from model.errors import CheckpointError
from model.language_model import MultiTokenModel
from tests.support.tiny_model import (
    greedy_continuation,
    head_logits,
    tiny_config,
    tiny_model,
    tiny_prompts,
    tiny_weights,
)

HEADS = [1, 2, 3, 4]
NUM_TOKENS = 28


@functools.cache
def random_model() -> MultiTokenModel:
    """A model whose heads know nothing, so that most drafts are wrong."""
    return tiny_model(tiny_config())


@functools.cache
def references() -> list[list[int]]:
    """Plain greedy continuations of the tiny prompts."""
    return [greedy_continuation(random_model(), prompt, NUM_TOKENS) for prompt in tiny_prompts()]


class PerfectDrafts:
    """Head 1 of a real model; heads 2 .. n spell what head 1 is known to say later.

    Its `hidden` already is logits.
    """

    def __init__(self, model: MultiTokenModel, texts: Sequence[Sequence[int]]) -> None:
        self.model = model
        self.texts = texts  # prompt and greedy continuation of each sequence

    def decode(
        self, tokens: Tensor, cache: KVCache, heads: Sequence[int], positions: Tensor | None = None
    ) -> Tensor:
        """Head 1 computed, the others looked up."""
        truth = self.model.logits(self.model.decode(tokens, cache, [1], positions))[0]
        batch = torch.arange(tokens.shape[0]).unsqueeze(1)
        positions_of = cache.positions if positions is None else cache.positions[batch, positions]
        outputs = [truth]
        for head in heads[1:]:
            output = torch.zeros_like(truth)
            for index, column in itertools.product(*map(range, positions_of.shape)):
                position = int(positions_of[index, column]) + head
                if position < len(self.texts[index]):
                    output[index, column, self.texts[index][position]] = 1
            outputs.append(output)
        return torch.stack(outputs)

    def logits(self, hidden: Tensor) -> Tensor:
        """They are there."""
        return hidden


def with_perfect_drafts(heads: int, num_tokens: int, eos_id: int | None = None) -> Generation:
    """Continue all prompts with drafts that are always right."""
    texts = [p + r for p, r in zip(tiny_prompts(), references(), strict=True)]
    return generate(
        PerfectDrafts(random_model(), texts),
        tiny_prompts(),
        heads=heads,
        max_new_tokens=num_tokens,
        eos_id=eos_id,
    )


def cut(tokens: list[int], eos_id: int) -> list[int]:
    """Tokens up to the first end of text."""
    return tokens[: tokens.index(eos_id) + 1] if eos_id in tokens else tokens


@pytest.mark.parametrize("heads", HEADS)
def test_greedy_equals_plain_decoding(heads: int) -> None:
    """Any number of heads gives head 1's own tokens, prompt by prompt and in a ragged batch."""
    batch = generate(random_model(), tiny_prompts(), heads=heads, max_new_tokens=NUM_TOKENS)
    assert batch.tokens == references()
    for prompt, expected in zip(tiny_prompts(), references(), strict=True):
        alone = generate(random_model(), [prompt], heads=heads, max_new_tokens=NUM_TOKENS)
        assert alone.tokens == [expected]


@pytest.mark.parametrize("heads", HEADS)
def test_end_of_text_ends_a_row_and_no_other(heads: int) -> None:
    """Each text stops at its first end of text; those that have none go on unharmed."""
    eos_id = references()[0][6]
    expected = [cut(tokens, eos_id) for tokens in references()]
    lengths = {len(tokens) for tokens in expected}
    assert len(lengths) > 1, "texts should end at different positions"
    found = generate(
        random_model(), tiny_prompts(), heads=heads, max_new_tokens=NUM_TOKENS, eos_id=eos_id
    )
    assert found.tokens == expected


@pytest.mark.parametrize("num_tokens", range(1, 10))
def test_limit_inside_a_block(num_tokens: int) -> None:
    """Exactly the asked number of tokens comes, wherever in a block of right drafts it ends."""
    expected = [tokens[:num_tokens] for tokens in references()]
    assert with_perfect_drafts(4, num_tokens).tokens == expected
    found = generate(random_model(), tiny_prompts(), heads=4, max_new_tokens=num_tokens)
    assert found.tokens == expected


@pytest.mark.parametrize("position", range(1, 9))
def test_end_of_text_inside_a_block(position: int) -> None:
    """With right drafts the end of text falls on every position of a block; the rest goes."""
    eos_id = references()[2][position]
    found = with_perfect_drafts(4, NUM_TOKENS, eos_id)
    assert found.tokens == [cut(tokens, eos_id) for tokens in references()]


@pytest.mark.parametrize("num_tokens", range(2, 8))
def test_a_row_that_ends_early_leaves_the_others_alone(num_tokens: int) -> None:
    """The longest text ends with right drafts to spare; it rests while the others go on."""
    longest = max(range(len(tiny_prompts())), key=lambda index: len(tiny_prompts()[index]))
    texts: list[list[int]] = [[] for _ in tiny_prompts()]
    texts[longest] = tiny_prompts()[longest] + references()[longest]
    model = PerfectDrafts(random_model(), texts)
    found = generate(model, tiny_prompts(), heads=4, max_new_tokens=num_tokens)
    assert found.tokens == [tokens[:num_tokens] for tokens in references()]
    assert len(found.blocks[longest]) == 1 + -(-(num_tokens - 1) // 4)


def test_heads_that_copy_head_1_do_no_harm() -> None:
    """Drafts that are plausible and at the wrong position are still verified."""
    config = tiny_config()
    weights = tiny_weights(config)
    for name in list(weights):
        for head in "234":
            copied = name.replace("heads.layers.1.", f"heads.layers.{head}.")
            weights[copied] = weights[name]
    model = tiny_model(config, weights)
    tokens = torch.tensor([tiny_prompts()[-1]])
    assert torch.equal(head_logits(model, tokens)[0], head_logits(model, tokens)[3])
    plain = generate(model, tiny_prompts(), heads=1, max_new_tokens=NUM_TOKENS)
    assert plain.tokens == [greedy_continuation(model, p, NUM_TOKENS) for p in tiny_prompts()]
    for heads in HEADS[1:]:
        found = generate(model, tiny_prompts(), heads=heads, max_new_tokens=NUM_TOKENS)
        assert found.tokens == plain.tokens


@pytest.mark.parametrize("heads", HEADS)
def test_forwards_add_up(heads: int) -> None:
    """Every forward gives a text 1 to k tokens, the prompt's gives 1, and nothing is lost."""
    found = generate(random_model(), tiny_prompts(), heads=heads, max_new_tokens=NUM_TOKENS)
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


def test_cache_after_rollback_is_that_of_a_fresh_prefill() -> None:
    """After forwards whose drafts were refused, the cache holds what the kept tokens alone give."""
    prompts = tiny_prompts()
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    padded = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
    texts = [list(prompt) for prompt in prompts]
    for index, prompt in enumerate(prompts):
        padded[index, : len(prompt)] = torch.tensor(prompt)
    decoder = Decoder(random_model(), heads=4)
    for text, token in zip(texts, decoder.prefill(padded, lengths, 64).tolist(), strict=True):
        text.append(token)
    refused = False
    for number in range(12):
        active = torch.arange(len(prompts)) != number % len(prompts)  # each sequence rests at times
        tokens, new = decoder.step(active)
        refused |= bool((new[active] < 4).any())
        for text, block, count in zip(texts, tokens.tolist(), new.tolist(), strict=True):
            text.extend(block[:count])
    assert refused
    for index, text in enumerate(texts):
        length = int(decoder.cache.lengths[index])
        assert length == len(text) - 1  # the last token is still to be read
        fresh = KVCache(1, 64, torch.device("cpu"))
        random_model().decode(torch.tensor([text[:length]]), fresh, [1, 2, 3, 4])
        for layer, (keys, values) in decoder.cache._layers.items():
            for kept, expected in zip((keys, values), fresh._layers[layer], strict=True):
                torch.testing.assert_close(kept[index, :length], expected[0, :length])


def test_prefill_forms_logits_of_the_last_position_only() -> None:
    """Asked for one position of each, decoding gives that one and fills the whole cache."""
    tokens = torch.tensor([tiny_prompts()[2], tiny_prompts()[4][:9]])
    all_heads = [1, 2, 3, 4]
    whole = random_model().decode(tokens, KVCache(2, 9, torch.device("cpu")), all_heads)
    last = torch.tensor([[3], [8]])
    some = random_model().decode(tokens, KVCache(2, 9, torch.device("cpu")), all_heads, last)
    assert some.shape == (4, 2, 1, 32)
    torch.testing.assert_close(some[:, 0, 0], whole[:, 0, 3])
    torch.testing.assert_close(some[:, 1, 0], whole[:, 1, 8])
    torch.testing.assert_close(random_model().logits(whole), head_logits(random_model(), tokens))


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
        model,
        [[1, 2]] * 10_000,
        heads=heads,
        max_new_tokens=3,
        temperature=1.5,
        generator=torch.Generator().manual_seed(0),
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


def test_sampling_repeats_with_its_seed() -> None:
    """One seed gives one text, another seed another; a cold temperature gives the greedy text."""

    def sample(seed: int, temperature: float) -> list[list[int]]:
        return generate(
            random_model(),
            tiny_prompts(),
            heads=4,
            max_new_tokens=20,
            temperature=temperature,
            generator=torch.Generator().manual_seed(seed),
        ).tokens

    assert sample(1, 1.0) == sample(1, 1.0) != sample(2, 1.0)
    assert sample(1, 1e-4) == [tokens[:20] for tokens in references()]


def test_logits_that_are_not_finite_are_not_drawn_from() -> None:
    """Of weights that are not numbers, or at a temperature that makes them infinite."""
    for weight, temperature in ((float("nan"), 1.0), (float("inf"), 1.0), (1.0, 1e-40)):
        model = random_model()
        model.heads.readout.weight.data.mul_(weight)
        generator = torch.Generator().manual_seed(0)
        with pytest.raises(CheckpointError, match="logits are not finite"):
            generate(
                model,
                tiny_prompts(),
                heads=4,
                max_new_tokens=4,
                temperature=temperature,
                generator=generator,
            )
