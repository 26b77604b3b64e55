"""Beam search is that of transformers, and beam sampling has the law that is defined for it."""

import itertools
from pathlib import Path

import pytest
import torch

from model.beams.hypotheses import BeamSettings
from model.beams.search import BeamDecoder, beam_search
from model.beams.speculative import SpeculativeDecoder
from model.beams.speculative_text import Speculation
from model.decoding.generation import generate
from model.decoding.sampling import Sampling
from model.hugging_face.importing import LlamaFolder
from model.inference.network import Network
from tests.model.decoding.test_chain import chi_square
from tests.model.decoding.test_draft_model import logits_after
from tests.support.tiny_llama import save_llama
from tests.support.tiny_model import tiny_config, tiny_network, tiny_prompts


@pytest.mark.parametrize(
    ("width", "penalty", "eos_ids"),
    [(1, 1.0, {7}), (3, 1.0, {7, 11}), (4, 0.0, {7}), (4, 2.0, {7}), (2, -1.0, {7}), (3, 1.0, {})],
)
def test_it_finds_the_texts_of_transformers(
    tmp_path: Path, width: int, penalty: float, eos_ids: set[int]
) -> None:
    """The same best beams and scores, with ends of texts and without, whatever the penalty."""
    llama = save_llama(tmp_path, vocab_size=20).double()
    folder = LlamaFolder(tmp_path)
    network = Network.read(folder.next_token_config(), folder.tensor, torch.float64)
    settings = BeamSettings(
        width, max_new_tokens=14, length_penalty=penalty, eos_ids=frozenset(eos_ids)
    )
    found = beam_search(network, tiny_prompts(), settings)
    lengths = set()
    for prompt, beams in zip(tiny_prompts(), found.ranked, strict=True):
        theirs = llama.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            num_beams=width,
            num_return_sequences=width,
            max_new_tokens=14,
            length_penalty=penalty,
            eos_token_id=sorted(eos_ids) or None,
            pad_token_id=19,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        wanted = [row[len(prompt) :].tolist() for row in theirs.sequences]
        for beam, tokens in zip(beams, wanted, strict=True):
            assert [*beam.tokens, *[19] * (len(tokens) - len(beam.tokens))] == tokens
        lengths |= {len(beam.tokens) for beam in beams}
        if width > 1:
            scores = [beam.normalized(penalty) for beam in beams]
            torch.testing.assert_close(
                torch.tensor(scores), theirs.sequences_scores, rtol=1e-5, atol=1e-5
            )
    assert len(lengths) > 1 or not eos_ids or penalty > 1  # which favours texts of full length


def test_heads_that_are_not_used_have_no_cache() -> None:
    """Beams take the memory of the next-token model's; those that two heads draft, one more."""
    many, settings = tiny_network(tiny_config()), BeamSettings(3, 9, Sampling(temperature=1.0))
    one = tiny_network(tiny_config(future_tokens=1, layers=3))  # of the same trunk
    found = BeamDecoder(many, tiny_prompts(), settings, range(5)).reader.cache
    expected = BeamDecoder(one, tiny_prompts(), settings, range(5)).reader.cache
    assert [b.shape for b in found.buffers] == [b.shape for b in expected.buffers]
    for drafter, heads in ((None, 2), (one, 1)):
        drafted = SpeculativeDecoder(
            many, tiny_prompts(), settings, Speculation(1), drafter, range(5)
        ).reader.cache
        groups = [buffer.shape[3] for buffer in drafted.buffers]
        assert groups == [2, 2, 2 * heads]


def test_one_beam_is_greedy_decoding() -> None:
    """Tokens and their logarithmic probabilities are those of the chain with one head."""
    network = tiny_network(tiny_config())
    expected = generate(
        network, tiny_prompts(), heads=1, max_new_tokens=24, eos_id=6, logprobs=True
    )
    found = beam_search(network, tiny_prompts(), BeamSettings(1, 24, eos_ids=frozenset({6})))
    assert found.tokens == expected.tokens
    assert expected.logprobs is not None
    for beams, logprobs in zip(found.ranked, expected.logprobs, strict=True):
        torch.testing.assert_close(list(beams[0].logprobs), logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.3, top_k=5)])
def test_scores_are_those_of_the_text_read_again(sampling: Sampling) -> None:
    """After any number of copies of rows a beam's logarithmic probability is that of its text."""
    network = tiny_network(tiny_config())
    found = beam_search(network, tiny_prompts(), BeamSettings(5, 9, sampling))
    for prompt, beams in zip(tiny_prompts(), found.ranked, strict=True):
        assert len(beams) == 5
        for beam in beams:
            text, total = list(prompt), 0.0
            for token, logprob in zip(beam.tokens, beam.logprobs, strict=True):
                logits = logits_after(network, [text])[0]
                assert logprob == pytest.approx(float(logits.log_softmax(0)[token]))
                if sampling.greedy:
                    total += logprob
                else:
                    best = logits.topk(5)
                    place = best.indices.tolist().index(token)
                    total += float((best.values / 1.3).log_softmax(0)[place])
                text.append(token)
            assert beam.score == pytest.approx(total)


def test_texts_of_a_batch_do_not_meet() -> None:
    """Drawn beams of a prompt are the same in any company."""
    network = tiny_network(tiny_config())
    settings = BeamSettings(3, 12, Sampling(temperature=1.5), eos_ids=frozenset(range(6)))
    together = beam_search(network, tiny_prompts(), settings, seeds=range(5))
    for number, prompt in enumerate(tiny_prompts()):
        alone = beam_search(network, [prompt], settings, seeds=[number])
        assert alone.tokens[0] == together.tokens[number]
        assert alone.widths[0] == together.widths[number]
    assert len({len(widths) for widths in together.widths}) > 1


@pytest.mark.parametrize("distinct", [False, True])
def test_drawn_beams_have_their_law(distinct: bool) -> None:
    """Counts of pairs of beams after two layers fit the law, and not that of the other way."""
    network = tiny_network(tiny_config(vocab_size=3))
    settings = BeamSettings(2, 2, Sampling(temperature=3.0), distinct=distinct)
    rows = 1500
    found = beam_search(network, [[1, 2]] * rows, settings, seeds=range(rows))
    # Beams of a layer are in the order of their draws; ended ones are ranked, so pairs are sorted.
    pairs = [tuple(sorted(beam.tokens for beam in beams)) for beams in found.ranked]
    laws = {way: _law_of_two_layers(network, 3.0, distinct=way) for way in (False, True)}
    cells = sorted(laws[False].keys() | laws[True].keys() | set(pairs))
    counts = torch.tensor([float(pairs.count(cell)) for cell in cells])
    chances = {w: torch.tensor([law.get(c, 0.0) for c in cells]) for w, law in laws.items()}
    assert abs(chi_square(counts, chances[distinct])) < 5
    assert chi_square(counts, chances[not distinct]) > 10


Pair = tuple[tuple[int, ...], ...]


def _law_of_two_layers(
    network: Network, temperature: float, *, distinct: bool
) -> dict[Pair, float]:
    """Of the sorted pair of beams after two layers, by enumeration."""
    first = (logits_after(network, [[1, 2]])[0] / temperature).softmax(0)
    after = (logits_after(network, [[1, 2, t] for t in range(3)]) / temperature).softmax(-1)
    law: dict[Pair, float] = {}
    for parents, chance in _pairs({(t,): float(first[t]) for t in range(3)}, distinct=distinct):
        mass = sum(float(first[beam[0]]) for beam in parents)
        # A beam that is there twice is two beams; the cells of both spell the same texts.
        cells = {
            (number, *beam, token): float(first[beam[0]] * after[beam[0], token]) / mass
            for number, beam in enumerate(parents)
            for token in range(3)
        }
        for children, more in _pairs(cells, distinct=distinct):
            pair = tuple(sorted(cell[1:] for cell in children))
            law[pair] = law.get(pair, 0.0) + chance * more
    assert sum(law.values()) == pytest.approx(1)
    return law


def _pairs(
    law: dict[tuple[int, ...], float], *, distinct: bool
) -> list[tuple[tuple[tuple[int, ...], ...], float]]:
    """Ordered pairs drawn from a law, with their probabilities."""
    return [
        ((a, b), law[a] * law[b] / (1 - law[a] if distinct else 1))
        for a, b in itertools.product(law, repeat=2)
        if not (distinct and a == b)
    ]
