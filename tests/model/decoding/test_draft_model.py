"""Drafts of a second model: texts are the first model's, and the drafter's cache keeps up."""

import pytest
import torch

from model.decoding.draft_model import DraftModelDecoder
from model.decoding.generation import Generation, collect, generate, stream
from model.decoding.sampling import GREEDY, Sampling
from model.inference.network import Network
from model.inference.prefill import prefill
from tests.model.decoding.test_chain import chi_square
from tests.support.tiny_model import tiny_config, tiny_network, tiny_prompts, tiny_weights


def smaller(vocab_size: int = 20) -> Network:
    """Another model: other sizes and weights."""
    config = tiny_config(
        vocab_size=vocab_size, layers=3, future_tokens=1, hidden_size=16, attention_heads=2
    )
    return tiny_network(config, tiny_weights(config, seed=3))


def decode(drafter: Network, drafts: int, sampling: Sampling = GREEDY) -> Generation:
    """Continue the tiny prompts by 24 tokens, an end of text among them."""
    network = tiny_network(tiny_config())
    decoder = DraftModelDecoder(network, drafter=drafter, drafts=drafts, sampling=sampling)
    pieces = stream(decoder, tiny_prompts(), max_new_tokens=24, eos_id=6)
    return collect(pieces, len(tiny_prompts()))


@pytest.mark.parametrize("drafts", [1, 2, 5])
def test_greedy_texts_are_the_first_models(drafts: int) -> None:
    """A stranger's drafts change nothing, and the model's own are all kept."""
    network = tiny_network(tiny_config())
    expected = generate(network, tiny_prompts(), heads=1, max_new_tokens=24, eos_id=6)
    assert len({len(text) for text in expected.tokens}) > 1
    stranger = decode(smaller(), drafts)
    assert stranger.tokens == expected.tokens
    assert 1 < stranger.tokens_per_forward < drafts + 1
    own = decode(network, drafts)
    assert own.tokens == expected.tokens
    for blocks in own.blocks:
        assert all(len(block) == drafts + 1 for block in blocks[1:-1])


def test_its_cache_keeps_up() -> None:
    """Whatever was kept, the drafter has read the text up to the token before the last."""
    drafter, network = smaller(), tiny_network(tiny_config())
    decoder = DraftModelDecoder(network, drafter=drafter, drafts=3)
    texts = [list(prompt) for prompt in tiny_prompts()]
    step = decoder.prefill(tiny_prompts(), 60)
    for _ in range(10):
        for text, new in zip(texts, step.tokens, strict=True):
            text.extend(new)
        for row, text in enumerate(texts):
            fresh = drafter.new_cache(1, 128)
            length = len(text) - 1
            with torch.no_grad():
                prefill(drafter, fresh, torch.tensor([text]), torch.tensor([length + 1]), 1)
            for kept, wanted in zip(decoder.drafter_cache.buffers, fresh.buffers, strict=True):
                torch.testing.assert_close(kept[row, : length + 1], wanted[0, : length + 1])
        step = decoder.step()


def test_sampled_texts_follow_the_first_model() -> None:
    """Counts of pairs of tokens fit those of one head alone, and not those of the drafter."""
    config = tiny_config(vocab_size=5, future_tokens=3)
    network, drafter = tiny_network(config), smaller(5)
    sampling = Sampling(temperature=1.5)
    prompts, rows = [[1, 2]] * 8000, 8000

    def counts(texts: list[list[int]]) -> torch.Tensor:
        codes = torch.tensor(texts)[:, :2] @ torch.tensor([5, 1])
        return torch.bincount(codes, minlength=25).double()

    decoder = DraftModelDecoder(network, drafter=drafter, drafts=2, sampling=sampling)
    found = collect(stream(decoder, prompts, max_new_tokens=3), rows)
    probabilities = torch.softmax(logits_after(network, [[1, 2]])[0] / 1.5, dim=-1)
    second = torch.softmax(logits_after(network, [[1, 2, t] for t in range(5)]) / 1.5, dim=-1)
    expected = (probabilities.unsqueeze(1) * second).flatten()
    assert abs(chi_square(counts(found.tokens), expected)) < 5
    alone = generate(
        drafter, prompts, heads=1, max_new_tokens=3, sampling=sampling, seeds=range(rows)
    )
    assert chi_square(counts(alone.tokens), expected) > 10


@torch.no_grad()
def logits_after(network: Network, texts: list[list[int]]) -> torch.Tensor:
    """Head 1's logits `[B, V]` after texts of one length."""
    lengths = torch.tensor([len(text) for text in texts])
    return prefill(network, network.new_cache(len(texts), 8), torch.tensor(texts), lengths, 1)[0]
