"""Drafts of an adapter on the first layers: texts are the model's, and the cache keeps up."""

import functools
from collections.abc import Sequence

import pytest
import torch

from model.decoding.batch import Batch, Request
from model.decoding.chain import RowOptions
from model.decoding.generation import Generation, collect, generate, stream
from model.decoding.sampling import GREEDY, Sampling
from model.early_exit.decoder import EarlyExitDecoder, confidence
from model.early_exit.network import EarlyExitNetwork
from model.inference.network import Network
from model.inference.prefill import prefill
from model.inference.products import Matrix
from model.inference.weights import LayerWeights, SerialHeads
from tests.model.decoding.test_chain import chi_square
from tests.model.decoding.test_draft_model import logits_after
from tests.support.tiny_model import tiny_config, tiny_network, tiny_prompts, tiny_weights

THRESHOLDS = [0.0, 0.25, 0.6, 1.0]
MOST = 4


@functools.cache
def model() -> Network:
    """Six trunk layers below two heads that are layers of their own."""
    return tiny_network(tiny_config(layers=8, future_tokens=2, head_kind="causal"))


def rest_of(network: Network, layer: int) -> tuple[LayerWeights[Matrix], ...]:
    """The model's own layers from the exit to head 1's: an adapter that is always right."""
    assert isinstance(network.weights.heads, SerialHeads)
    return (*network.weights.trunk[layer:], *network.weights.heads.layers[1])


def stranger(vocab_size: int = 20) -> tuple[LayerWeights[Matrix], ...]:
    """A layer of other weights, which seldom is."""
    config = tiny_config(vocab_size=vocab_size)
    return tiny_network(config, tiny_weights(config, seed=3)).weights.trunk[:1]


def decode(
    network: EarlyExitNetwork,
    threshold: float,
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    num_tokens: int = 24,
    eos_id: int | None = None,
    sampling: Sampling = GREEDY,
    seeds: Sequence[int] | None = None,
) -> Generation:
    """Continue prompts, by default the tiny ones together."""
    prompts = tiny_prompts() if prompts is None else prompts
    decoder = EarlyExitDecoder(
        network, threshold=threshold, most_drafts=MOST, sampling=sampling, seeds=seeds
    )
    pieces = stream(decoder, prompts, max_new_tokens=num_tokens, eos_id=eos_id)
    return collect(pieces, len(prompts))


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("layer", [1, 3, 6])
def test_greedy_texts_are_the_models(layer: int, threshold: float) -> None:
    """Alone and in ragged batches that end at different places; right and wrong adapters."""
    expected = generate(model(), tiny_prompts(), heads=1, max_new_tokens=24, eos_id=6)
    assert len({len(text) for text in expected.tokens}) > 1
    for adapter in (stranger(), rest_of(model(), layer)):
        network = EarlyExitNetwork(model(), layer, adapter)
        assert decode(network, threshold, eos_id=6).tokens == expected.tokens
        for prompt, text in zip(tiny_prompts(), expected.tokens, strict=True):
            alone = decode(network, threshold, prompts=[prompt], eos_id=6)
            assert alone.tokens == [text]


@pytest.mark.parametrize("kind", ["parallel", "anticausal", "linear"])
@pytest.mark.parametrize("lm_head", ["shared", "replicated"])
def test_every_kind_of_heads_verifies(kind: str, lm_head: str) -> None:
    """The adapter's part of the cache does not meet that of the heads, whatever they are."""
    config = tiny_config(layers=7, future_tokens=3, head_kind=kind, lm_head=lm_head)
    network = tiny_network(config)
    expected = generate(network, tiny_prompts(), heads=1, max_new_tokens=24)
    found = decode(EarlyExitNetwork(network, 2, stranger()), 0.0)
    assert found.tokens == expected.tokens


@pytest.mark.parametrize("num_tokens", range(1, 9))
@pytest.mark.parametrize("eos", [False, True])
def test_a_text_ends_inside_a_block_of_right_drafts(num_tokens: int, eos: bool) -> None:
    """By its limit or by its end of text, which then falls on every place of a block."""
    whole = generate(model(), tiny_prompts(), heads=1, max_new_tokens=24).tokens
    eos_id = whole[2][num_tokens] if eos else None
    network = EarlyExitNetwork(model(), 2, rest_of(model(), 2))
    limit = 24 if eos else num_tokens
    expected = generate(model(), tiny_prompts(), heads=1, max_new_tokens=limit, eos_id=eos_id)
    found = decode(network, 0.0, num_tokens=limit, eos_id=eos_id)
    assert found.tokens == expected.tokens


def test_the_threshold_says_how_many_tokens_are_drafted() -> None:
    """0 always drafts all, 1 drafts one; between, drafting ends with the first unsure one."""
    network = EarlyExitNetwork(model(), 2, rest_of(model(), 2))
    prompt = tiny_prompts()[1]
    for threshold, size in ((0.0, MOST + 1), (1.0, 2)):
        blocks = decode(network, threshold, prompts=[prompt]).blocks[0]
        assert {len(block) for block in blocks[1:-1]} == {size}

    blocks = decode(network, 0.3, prompts=[prompt]).blocks[0]
    assert len({len(block) for block in blocks[1:-1]}) > 1
    text = [*prompt, *blocks[0]]
    for block in blocks[1:-1]:
        sure = [
            float(confidence(logits_after(model(), [text + block[:number]]))) > 0.3
            for number in range(MOST)
        ]
        drafts = sure.index(False) + 1 if False in sure else MOST
        assert len(block) == drafts + 1
        text += block


def test_counts_of_drafts_add_up() -> None:
    """With an adapter that is always right every draft that is tried is kept; not with another."""
    for adapter, always in ((rest_of(model(), 3), True), (stranger(), False)):
        network = EarlyExitNetwork(model(), 3, adapter)
        decoder = EarlyExitDecoder(network, threshold=0.25, most_drafts=MOST)
        found = collect(stream(decoder, tiny_prompts(), max_new_tokens=24), len(tiny_prompts()))
        steps = sum(len(blocks) - 1 for blocks in found.blocks)
        assert decoder.tried[0] == steps  # the first draft is always made
        assert (decoder.tried == decoder.kept) == always
        assert all(k <= t for k, t in zip(decoder.kept, decoder.tried, strict=True))
        assert all(t <= k for t, k in zip(decoder.tried[1:], decoder.kept, strict=False))


@pytest.mark.parametrize("threshold", [0.0, 0.25])
def test_the_cache_is_that_of_the_text_alone(threshold: float) -> None:
    """Whatever was kept, keys and values of model and adapter are those of reading the text."""
    network = EarlyExitNetwork(model(), 2, stranger())
    decoder = EarlyExitDecoder(network, threshold=threshold, most_drafts=MOST)
    texts = [list(prompt) for prompt in tiny_prompts()]
    step = decoder.prefill(tiny_prompts(), 60)
    kept = set()
    for _ in range(10):
        for row, (text, new) in enumerate(zip(texts, step.tokens, strict=True)):
            text.extend(new)
            kept.add(len(new))
            length = len(text) - 1  # the last one is read in the next step
            fresh = network.new_cache(1, 128, heads=1)
            with torch.no_grad():
                prefill(network, fresh, torch.tensor([text]), torch.tensor([length]), 1)
            assert int(decoder.cache.lengths[row]) == length
            for mine, wanted in zip(decoder.cache.buffers, fresh.buffers, strict=True):
                torch.testing.assert_close(mine[row, :length], wanted[0, :length])
        step = decoder.step()
    assert len(kept) > 2


def test_rows_join_and_leave() -> None:
    """A text that joins others with drafts of their own is what it would be alone."""
    network = EarlyExitNetwork(model(), 2, stranger())
    options = [RowOptions(), RowOptions(Sampling(temperature=0.8), seed=5), RowOptions()]
    prompts = tiny_prompts()[:3]

    def request(row: int) -> Request:
        return Request(prompts[row], 20 - 4 * row, options=options[row])

    def texts(rows: Sequence[int], late: Sequence[int]) -> dict[int, list[int]]:
        decoder = EarlyExitDecoder(network, threshold=0.25, most_drafts=MOST)
        batch = Batch(decoder, rows=3, capacity=60)
        found: dict[int, list[int]] = {row: [] for row in (*rows, *late)}
        pieces = batch.join({row: request(row) for row in rows})
        for number in range(40):
            if number == 2 and late:
                pieces += batch.join({row: request(row) for row in late})
            for piece in pieces:
                found[piece.row] += piece.tokens
            pieces = batch.step() if batch.rows else []
        return found

    together = texts([0], [1, 2])
    assert together == {row: texts([row], [])[row] for row in range(3)}


def test_sampled_texts_follow_the_model() -> None:
    """Counts of three tokens fit the model's own distribution, and not a uniform one."""
    config = tiny_config(vocab_size=4, layers=5, future_tokens=1)
    network = tiny_network(config)
    sampling, rows = Sampling(temperature=1.5), 6000
    prompt = [1, 2]
    early = EarlyExitNetwork(network, 1, stranger(4))
    # Between the confidences of the adapter: some rows draft on, and others wait for them.
    found = decode(early, 0.6, prompts=[prompt] * rows, num_tokens=4, sampling=sampling)
    assert {len(blocks[1]) for blocks in found.blocks} >= {1, 2, 3}
    codes = torch.tensor(found.tokens)[:, :3] @ torch.tensor([16, 4, 1])
    counts = torch.bincount(codes, minlength=64).double()

    def chances(texts: list[list[int]]) -> torch.Tensor:
        return torch.softmax(logits_after(network, texts) / 1.5, dim=-1)

    first = chances([prompt])[0]
    second = chances([[*prompt, a] for a in range(4)])
    third = chances([[*prompt, a, b] for a in range(4) for b in range(4)]).view(4, 4, 4)
    expected = (first[:, None, None] * second[:, :, None] * third).flatten()
    assert abs(chi_square(counts, expected)) < 5
    uniform = torch.full_like(expected, 1 / len(expected))
    assert chi_square(counts, uniform) > 10


def test_a_sampled_text_is_the_same_in_any_company() -> None:
    """Its random numbers do not depend on how many tokens other rows draft."""
    network = EarlyExitNetwork(model(), 2, rest_of(model(), 2))
    sampling, seeds = Sampling(temperature=1.0), [11, 12, 13, 14, 15]
    together = decode(network, 0.3, sampling=sampling, seeds=seeds)
    for prompt, seed, blocks in zip(tiny_prompts(), seeds, together.blocks, strict=True):
        alone = decode(network, 0.3, prompts=[prompt], sampling=sampling, seeds=[seed])
        assert alone.blocks == [blocks]
