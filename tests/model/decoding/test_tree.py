"""Trees of drafts: their shape, which path is kept, and what is left in the cache."""

import itertools
import random

import pytest
import torch

from model.decoding.acceptance import accept_tree
from model.decoding.chain import ChainDecoder
from model.decoding.generation import Generation, collect, stream
from model.decoding.sampling import GREEDY, Sampling
from model.decoding.tree import Tree, TreeDecoder
from model.inference.prefill import prefill
from tests.model.decoding.test_chain import chi_square
from tests.support.tiny_model import (
    head_logits,
    tiny_config,
    tiny_model,
    tiny_network,
    tiny_prompts,
)

CPU = torch.device("cpu")


def test_shape_of_a_small_tree() -> None:
    """Three heads, spread 1: two tokens of head 2, then three pairs."""
    tree = Tree(3, 1, CPU)
    assert tree.size == 6
    assert tree.depths.tolist() == [0, 1, 2, 1, 2, 2]
    assert tree.candidates.tolist() == [0, 2, 1, 3, 2]
    assert tree.parents.tolist() == [0, 0, 1, 0, 1, 3]
    assert tree.paths.tolist() == [[0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 3, 2], [0, 1, 4], [0, 3, 5]]
    assert tree.ancestors[5].nonzero().flatten().tolist() == [0, 3, 5]
    assert tree.children.tolist()[:4] == [[1, 3], [2, 4], [-1, -1], [5, -1]]
    assert tree.straight == [True, True, True, False, False, False]
    assert Tree(4, 0, CPU).paths[-1].tolist() == [0, 1, 2, 3]
    assert Tree(1, 3, CPU).size == 1


@pytest.mark.parametrize(("heads", "spread"), [(2, 3), (3, 1), (4, 2)])
def test_the_path_of_the_likeliest_tokens_is_kept(heads: int, spread: int) -> None:
    """Against a walk from the root, over random trees with few tokens, so that many are right."""
    tree, chance = Tree(heads, spread, CPU), random.Random(0)
    parents = dict(enumerate(tree.parents.tolist()[1:], 1))
    depths = set()
    for _ in range(300):
        tokens, best = [0] * tree.size, [chance.randrange(5) for _ in range(tree.size)]
        for parent in range(tree.size):
            children = [node for node, above in parents.items() if above == parent]
            for node, token in zip(children, chance.sample(range(5), len(children)), strict=True):
                tokens[node] = token
        node = 0
        while right := [n for n, p in parents.items() if p == node and tokens[n] == best[node]]:
            [node] = right
        found = accept_tree(
            torch.tensor([best]),
            torch.tensor([tokens]),
            tree.parents,
            tree.ancestors,
            tree.depths,
        )
        assert found.tolist() == [node]
        depths.add(int(tree.depths[node]))
    assert depths == set(range(heads))


def test_a_tree_keeps_no_less_than_a_chain() -> None:
    """Spread 0 is the chain, forward by forward; a wider tree needs no more forwards."""
    network = tiny_network(tiny_config())
    found: dict[object, Generation] = {}
    for name, decoder in (
        ("chain", ChainDecoder(network, heads=4)),
        *((spread, TreeDecoder(network, heads=4, spread=spread)) for spread in (0, 1, 3)),
        ("all", TreeDecoder(network, heads=2, spread=50)),
    ):
        pieces = stream(decoder, tiny_prompts()[2:3], max_new_tokens=40)
        found[name] = collect(pieces, 1)
    assert found[0].blocks == found["chain"].blocks
    assert len({str(result.tokens) for result in found.values()}) == 1
    assert found[3].forwards < found["chain"].forwards
    assert found["all"].forwards == 1 + -(-39 // 2)  # every token is in the tree


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0)])
def test_cache_after_a_path_was_kept_is_that_of_a_fresh_prefill(sampling: Sampling) -> None:
    """Keys and values of the kept nodes lie where the text's are, in every layer, in every row."""
    network = tiny_network(tiny_config())
    decoder = TreeDecoder(network, heads=4, spread=4, sampling=sampling)
    texts = [list(prompt) for prompt in tiny_prompts()]
    step = decoder.prefill(tiny_prompts(), 60)
    sizes = []
    for _ in range(10):
        for text, new in zip(texts, step.tokens, strict=True):
            text.extend(new)
        for row, text in enumerate(texts):
            length = len(text) - 1
            fresh = network.new_cache(1, 128)
            with torch.no_grad():
                prefill(network, fresh, torch.tensor([text[:-1]]), torch.tensor([length]), 4)
            for kept, expected in zip(decoder.cache.buffers, fresh.buffers, strict=True):
                torch.testing.assert_close(kept[row, :length], expected[0, :length])
        step = decoder.step()
        sizes += [len(new) for new in step.tokens]
    assert {1, 2} <= set(sizes)


def test_logprobs_follow_the_path() -> None:
    """They are the chain's."""
    network = tiny_network(tiny_config())
    results = []
    for decoder in (
        ChainDecoder(network, heads=1, logprobs=True),
        TreeDecoder(network, heads=3, spread=3, logprobs=True),
    ):
        pieces = stream(decoder, tiny_prompts(), max_new_tokens=12)
        found = collect(pieces, len(tiny_prompts())).logprobs
        assert found is not None
        results.append([torch.tensor(each) for each in found])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("spread", [1, 2])
def test_sampled_texts_follow_the_model(spread: int) -> None:
    """Counts of 10,000 sampled texts fit the model at that temperature and at no other."""
    config = tiny_config(vocab_size=5, future_tokens=3)
    model = tiny_model(config)
    decoder = TreeDecoder(
        tiny_network(config), heads=3, spread=spread, sampling=Sampling(temperature=1.5)
    )
    found = collect(stream(decoder, [[1, 2]] * 10_000, max_new_tokens=3), 10_000)
    codes = torch.tensor(found.tokens) @ torch.tensor([25, 5, 1])
    counts = torch.bincount(codes, minlength=125).double()
    texts = list(itertools.product(range(5), repeat=3))
    logits = head_logits(model, torch.tensor([[1, 2, *text] for text in texts]))[0, :, 1:4]

    def distribution(temperature: float) -> torch.Tensor:
        distributions = torch.softmax(logits / temperature, dim=-1)
        return distributions.gather(2, torch.tensor(texts).unsqueeze(2)).prod(1).squeeze(1)

    assert abs(chi_square(counts, distribution(1.5))) < 5
    assert chi_square(counts, distribution(1.9)) > 10
    assert found.tokens_per_forward > 1


def test_a_wider_sampled_tree_keeps_more() -> None:
    """Where drafts are as likely as not, the second candidate is often kept."""
    network = tiny_network(tiny_config(vocab_size=5, future_tokens=3))
    sampling = Sampling(temperature=1.0)
    found = []
    for spread in (0, 3):
        decoder = TreeDecoder(network, heads=3, spread=spread, sampling=sampling)
        pieces = stream(decoder, [[1, 2]] * 300, max_new_tokens=20)
        found.append(collect(pieces, 300).tokens_per_forward)
    assert found[1] > 1.1 * found[0]


def test_a_penalty_counts_a_nodes_ancestors() -> None:
    """Greedy text under a repetition penalty is that of head 1 alone."""
    network = tiny_network(tiny_config())
    sampling = Sampling(repetition_penalty=1.6)
    texts = []
    for decoder in (
        ChainDecoder(network, heads=1, sampling=sampling),
        TreeDecoder(network, heads=4, spread=3, sampling=sampling),
    ):
        texts.append(collect(stream(decoder, tiny_prompts(), max_new_tokens=30), 5))
    assert texts[0].tokens == texts[1].tokens
    assert texts[1].tokens_per_forward > 1.05
