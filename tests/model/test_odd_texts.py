"""Beams and joint decoding at the edges: of widths, prompts, limits and ends of text."""

from collections.abc import Callable, Sequence

import pytest

from model.beams.hypotheses import BeamSettings
from model.beams.search import beam_search
from model.beams.speculative import speculative_beams
from model.beams.speculative_text import Speculation
from model.decoding.generation import collect, stream
from model.decoding.sampling import GREEDY, Sampling
from model.inference.network import Network
from model.joint_decoding.decoder import JointDecoder
from model.joint_decoding.draft_model import JointModelDecoder
from model.joint_decoding.rule import JointRule
from tests.support.tiny_model import tiny_config, tiny_network

Ways = dict[str, Callable[[], list[list[int]]]]


def _ways(vocab_size: int, prompts: Sequence[Sequence[int]], settings: BeamSettings) -> Ways:
    """New tokens by every decoder that keeps several texts."""
    network = tiny_network(tiny_config(vocab_size=vocab_size))
    drafter = tiny_network(tiny_config(vocab_size=vocab_size, layers=3, future_tokens=1))

    def drafted(second: Network | None, least: int) -> list[list[int]]:
        speculation = Speculation(3, 0.5, least)
        return speculative_beams(network, prompts, settings, speculation, drafter=second).tokens

    def joint(decoder: JointDecoder) -> list[list[int]]:
        pieces = stream(
            decoder, prompts, max_new_tokens=settings.max_new_tokens, eos_id=settings.eos_ids
        )
        return collect(pieces, len(prompts)).tokens

    rule, sampling, ends = (
        JointRule(settings.width, settings.width),
        settings.sampling,
        settings.eos_ids,
    )
    ways: Ways = {
        "beam": lambda: beam_search(network, prompts, settings).tokens,
        "mtad": lambda: joint(
            JointDecoder(network, heads=4, rule=rule, eos_id=ends, sampling=sampling)
        ),
        "mtad by a model": lambda: joint(
            JointModelDecoder(
                network, drafter=drafter, drafts=2, rule=rule, eos_id=ends, sampling=sampling
            )
        ),
    }
    if not sampling.greedy:
        ways["dsbd"] = lambda: drafted(None, 1)
        ways["dsbd, all wide"] = lambda: drafted(None, settings.width)
        ways["dsbd by a model"] = lambda: drafted(drafter, 1)
    return ways


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0), Sampling(1.0, top_k=1)])
@pytest.mark.parametrize("width", [1, 5])
@pytest.mark.parametrize("vocab_size", [1, 3])
def test_every_text_ends_as_it_should(vocab_size: int, width: int, sampling: Sampling) -> None:
    """At its limit or its first end of text; with more beams than tokens, and a long prompt."""
    prompts = [[0], [vocab_size - 1] * 70]
    for ends in (frozenset[int](), frozenset({0}), frozenset(range(vocab_size))):
        for limit in (1, 4):
            settings = BeamSettings(width, limit, sampling, eos_ids=ends)
            for name, run in _ways(vocab_size, prompts, settings).items():
                for tokens in run():
                    where = (name, ends, limit, tokens)
                    assert 1 <= len(tokens) <= limit, where
                    assert len(tokens) == limit or tokens[-1] in ends, where
                    assert not ends & set(tokens[:-1]), where
