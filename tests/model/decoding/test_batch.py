"""A running batch: each row gets what it would get alone, whoever joins or leaves, and when."""

import functools
import itertools
import random
from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer

from model.decoding.batch import Batch, Decoder, Piece, Request
from model.decoding.chain import ChainDecoder, RowOptions
from model.decoding.draft_model import DraftModelDecoder
from model.decoding.generation import generate
from model.decoding.lossy import LossyDecoder, LossyRule
from model.decoding.sampling import GREEDY, Sampling
from model.decoding.stopping import StopStrings
from model.decoding.tree import TreeDecoder
from model.inference.network import Network
from model.inference.prefill import prefill
from tests.model.decoding.test_greedy_equality import agreeing
from tests.support.tiny_export import VOCABULARY, byte_tokenizer
from tests.support.tiny_model import tiny_config, tiny_network, tiny_weights

ROWS, CAPACITY = 5, 50
SAMPLINGS = (
    GREEDY,
    Sampling(temperature=1.1),
    Sampling(repetition_penalty=1.5),
    Sampling(temperature=0.8, top_k=9),
    Sampling(temperature=1.4, top_p=0.7, repetition_penalty=1.2),
    Sampling(temperature=1.0, min_p=0.1),
)


@functools.cache
def network() -> Network:
    """A model whose drafts are often right, in fp64 where rounding decides nothing."""
    return tiny_network(tiny_config(vocab_size=VOCABULARY), agreeing())


@functools.cache
def drafter() -> Network:
    """A smaller one."""
    config = tiny_config(vocab_size=VOCABULARY, layers=3, future_tokens=1)
    return tiny_network(config, tiny_weights(config, seed=3))


DECODERS: dict[str, Callable[[], Decoder]] = {
    "1 head": lambda: ChainDecoder(network(), heads=1),
    "chain of 2": lambda: ChainDecoder(network(), heads=2),
    "chain of 4": lambda: ChainDecoder(network(), heads=4),
    "draft model": lambda: DraftModelDecoder(network(), drafter=drafter(), drafts=3),
    "lossy": lambda: LossyDecoder(network(), heads=3, rule=LossyRule(top_k=4)),
    "tree": lambda: TreeDecoder(network(), heads=3, spread=2),
}


def some_requests(samplings: tuple[Sampling, ...], count: int = 18) -> list[Request]:
    """Texts of many lengths with limits, ends, seeds and samplings of their own."""
    chance = random.Random(7)
    stop = StopStrings(Tokenizer.from_buffer(byte_tokenizer()), ["a", "é"])
    return [
        Request(
            [chance.randrange(256) for _ in range(chance.choice((1, 3, 9, 30)))],
            chance.choice((1, 2, 5, 12, 20)),
            chance.sample(range(256), 40) if number % 3 == 0 else None,
            stop if number % 4 == 0 else None,
            RowOptions(
                chance.choice(samplings), chance.randrange(1 << 40), chance.choice((None, 2))
            ),
        )
        for number, likeliest in zip(range(count), itertools.cycle((None, 2, 0)))
    ]


def collected(pieces: list[Piece]) -> tuple[list[int], list[list[tuple[int, float]]], bool]:
    """A text with what was said of it, and whether its limit ended it."""
    assert [piece.ended for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    tokens = [token for piece in pieces for token in piece.tokens]
    return tokens, [o for piece in pieces for o in piece.likeliest or []], pieces[-1].at_limit


def alone(decoder: Decoder, request: Request) -> list[Piece]:
    """What a row gets in a batch of its own."""
    batch = Batch(decoder, 1, CAPACITY)
    pieces = batch.join({0: request})
    while batch.rows:
        pieces += batch.step()
    return pieces


@pytest.mark.parametrize("kind", DECODERS)
def test_a_row_gets_what_it_gets_alone(kind: str) -> None:
    """Rows join and are taken out at random; all others are token for token as alone."""
    requests = some_requests(SAMPLINGS)
    batch = Batch(DECODERS[kind](), ROWS, CAPACITY)
    chance = random.Random(1)
    pieces: dict[int, list[Piece]] = {number: [] for number in range(len(requests))}
    waiting, cancelled, sizes = list(pieces), set(), set()
    while waiting or batch.rows:
        room = min(ROWS - len(batch.rows), len(waiting))
        joining = [waiting.pop() for _ in range(chance.randint(0, room))]
        found = batch.join({number: requests[number] for number in joining}) if joining else []
        sizes.add(len(batch.rows))
        found += batch.step() if batch.rows else []
        for piece in found:
            pieces[piece.row].append(piece)
        if batch.rows and chance.random() < 0.1:
            cancelled.add(batch.rows[-1])
            batch.leave(batch.rows[-1:])
    assert len(sizes) > 3
    several = any(len(piece.tokens) > 1 for found in pieces.values() for piece in found)
    assert several or kind in ("1 head", "draft model")
    assert 0 < len(cancelled) < 8
    for number, request in enumerate(requests):
        expected = alone(DECODERS[kind](), request)
        if number in cancelled:
            count = len(pieces[number])
            assert [p.tokens for p in pieces[number]] == [p.tokens for p in expected][:count]
            continue
        tokens, likeliest, at_limit = collected(pieces[number])
        wanted_tokens, wanted, wanted_at_limit = collected(expected)
        assert tokens == wanted_tokens, (number, request)
        assert at_limit == wanted_at_limit
        assert [[i for i, _ in o] for o in likeliest] == [[i for i, _ in o] for o in wanted]
        assert len(likeliest) == (len(tokens) if request.options.likeliest else 0)
        if kind != "lossy" and request.options.sampling == GREEDY:
            plain = generate(network(), [request.prompt], heads=1, max_new_tokens=len(tokens))
            assert plain.tokens == [tokens]


def test_the_number_of_heads_may_change_at_any_step() -> None:
    """Greedy texts stay those of head 1, and drafts of all heads are as good as before."""
    requests = some_requests((GREEDY,), 9)
    decoder = ChainDecoder(network(), heads=4)
    chance = random.Random(2)
    batch = Batch(decoder, ROWS, CAPACITY, lambda _: decoder.use_heads(chance.randint(1, 4)))
    tokens: dict[int, list[int]] = {number: [] for number in range(len(requests))}
    waiting, sizes = list(tokens), set()
    while waiting or batch.rows:
        joining = [waiting.pop() for _ in range(min(ROWS - len(batch.rows), len(waiting), 2))]
        found = batch.join({number: requests[number] for number in joining}) if joining else []
        found += batch.step() if batch.rows else []
        for piece in found:
            tokens[piece.row] += piece.tokens
            sizes.add(len(piece.tokens))
        for place, number in enumerate(batch.rows):
            check_cache(decoder, place, [*requests[number].prompt, *tokens[number]])
    assert len(sizes) > 1
    for number, request in enumerate(requests):
        count = len(tokens[number])
        plain = generate(network(), [request.prompt], heads=1, max_new_tokens=count)
        assert plain.tokens == [tokens[number]]


def check_cache(decoder: ChainDecoder, place: int, text: list[int]) -> None:
    """Keys and values of all heads are those of the text, but for its last token, still unread."""
    length = len(text) - 1
    fresh = network().new_cache(1, 64)
    with torch.no_grad():
        prefill(network(), fresh, torch.tensor([text[:-1]]), torch.tensor([length]), 4)
    assert int(decoder.cache.lengths[place]) == length
    for kept, expected in zip(decoder.cache.buffers, fresh.buffers, strict=True):
        torch.testing.assert_close(kept[place, :length], expected[0, :length])


def test_a_batch_holds_no_more_than_it_has_room_for() -> None:
    """More rows, or a longer one, are a mistake of the caller, not a damaged batch."""
    batch = Batch(ChainDecoder(network(), heads=2), 1, 8)
    with pytest.raises(AssertionError, match="8"):
        batch.join({0: Request([1, 2], 7)})
    batch.join({0: Request([1, 2], 6)})
    with pytest.raises(AssertionError, match="no room"):
        batch.join({1: Request([1], 1)})
