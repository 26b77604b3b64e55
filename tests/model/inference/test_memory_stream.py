"""A stream that is read in pieces: the same as at once, the same as in training, and no larger."""

from typing import Any

import pytest
import torch

from model.errors import ConfigError
from model.inference.memory_stream import MemoryStream
from model.inference.network import Network
from tests.support.tiny_model import tiny_config, tiny_network, training_model

SIZES: dict[str, Any] = {"segment": 6, "summary": 4, "sensory": 2, "cache": 3, "width": 8}
TOLERANCE = 1e-9


def _network(**changes: Any) -> Network:
    config = tiny_config(layers=5, future_tokens=3, memory=SIZES | changes)
    return tiny_network(config)


def _tokens(length: int = 45) -> list[int]:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(20, (length,), generator=generator).tolist()


@pytest.mark.parametrize("changes", [{}, {"sensory": 0}, {"retrieval": False}])
def test_h9_pieces_of_any_size_give_what_training_gives(changes: dict[str, Any]) -> None:
    """Logits of every head at every token, and the same bits of memories from all pieces."""
    network, tokens = _network(**changes), _tokens()
    model = training_model(heads=3, memory=SIZES | changes)
    with torch.no_grad():
        trunk_output = model(torch.tensor([tokens]))
        expected = model.all_logits(trunk_output, model.heads_context(trunk_output))[:, :, 0]
    states = []
    for size in (1, 4, 6, 7, 45):
        stream = MemoryStream(network, heads=3)
        parts = [tokens[start : start + size] for start in range(0, len(tokens), size)]
        found = torch.cat([stream.feed(part) for part in parts], dim=1)
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
        states.append(stream.state)
    for state in states:
        assert torch.equal(state.memories, states[0].memories)
        assert state[1:] == states[0][1:]


@pytest.mark.parametrize("kind", [{"head_kind": "causal"}, {"head_kind": "linear"}])
def test_other_kinds_of_heads(kind: dict[str, Any]) -> None:
    """They see the segment's tokens, too, and nothing before."""
    config = tiny_config(layers=5, future_tokens=3, memory=SIZES, **kind)
    model = training_model(heads=3, memory=SIZES, **kind)
    tokens = _tokens(20)
    with torch.no_grad():
        trunk_output = model(torch.tensor([tokens]))
        expected = model.all_logits(trunk_output, model.heads_context(trunk_output))[:, :, 0]
    stream = MemoryStream(tiny_network(config), heads=3)
    found = torch.cat([stream.feed(tokens[:9]), stream.feed(tokens[9:])], dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def test_a_stream_goes_on_from_its_state() -> None:
    """At any token, the borders of segments among them."""
    network, tokens = _network(), _tokens(20)
    expected = MemoryStream(network).feed(tokens)
    for place in range(1, 20):
        begun = MemoryStream(network)
        begun.feed(tokens[:place])
        resumed = MemoryStream(network, state=begun.state)
        found = resumed.feed(tokens[place:])
        torch.testing.assert_close(found, expected[:, place:], rtol=0, atol=TOLERANCE)


def test_the_last_logits_are_those_of_all() -> None:
    """A long prompt is read without the logits of its tokens."""
    network, tokens = _network(), _tokens(20)
    torch.testing.assert_close(
        MemoryStream(network).last(tokens), MemoryStream(network).feed(tokens)[:, -1]
    )


def test_h10_what_is_kept_does_not_grow_with_the_stream() -> None:
    """Bytes that torch allocates at most, after 8 segments and after 80."""
    network, tokens = _network(), _tokens(6 * 8)
    stream = MemoryStream(network)
    stream.last(tokens)
    kept = []
    for _ in range(2):
        with torch.profiler.profile(profile_memory=True) as profile:
            stream.last(tokens)
        # Allocations of the events count negative where they free: their sum is what stays.
        kept.append(sum(event.self_cpu_memory_usage for event in profile.events()))
        for _ in range(9):
            stream.last(tokens)
        assert stream.state.memories.shape == (3, 32)
        assert len(stream.state.before) == 4
        assert stream.state.memories.untyped_storage().nbytes() <= 4 * 32 * 8
    assert abs(kept[0]) < 10_000
    assert abs(kept[1]) < 10_000


@pytest.mark.parametrize("mode", ["paper", "strict_score"])
def test_modes_that_look_ahead_do_not_stream(mode: str) -> None:
    """They say which mode does."""
    with pytest.raises(ConfigError, match="train with strict_prev"):
        MemoryStream(_network(mode=mode))
