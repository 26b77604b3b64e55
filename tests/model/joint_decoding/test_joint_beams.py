"""A beam of drafts grows: which continuations there are, and which are taken."""

import itertools

import pytest
import torch

from model.decoding.choosing import Chooser
from model.decoding.sampling import GREEDY, Sampling, penalize
from model.errors import CheckpointError
from model.joint_decoding.beams import Beams, choose_cells, ending_tokens
from model.joint_decoding.draft_model import JointModelDecoder
from tests.model.decoding.test_chain import chi_square
from tests.support.tiny_model import tiny_config, tiny_network, tiny_prompts, tiny_weights

CPU, VOCABULARY = torch.device("cpu"), 5


def chooser(*samplings: Sampling) -> Chooser:
    """One for rows of these samplings."""
    return Chooser(samplings, range(len(samplings)), VOCABULARY, CPU)


def test_a_finished_beam_stays_as_it_is() -> None:
    """It is one cell of the next layer, with its own score, and no node comes of it."""
    ends = ending_tokens(2, CPU)
    roots = Beams.of_roots(torch.tensor([1]), torch.float64)
    first = torch.tensor([[2, 4]]), torch.tensor([[-0.1, -1.0]], dtype=torch.float64)
    beams = roots.grown(*first, VOCABULARY, ends)
    assert beams.finished.tolist() == [[True, False]]
    conditional = torch.full((1, 2, VOCABULARY), -2.0, dtype=torch.float64)
    cells = beams.cells(conditional)
    assert cells[0, 0] == -0.1
    assert (cells[0, 1:VOCABULARY] == -torch.inf).all()
    assert (cells[0, VOCABULARY:] == -3.0).all()
    chosen = torch.tensor([[0, VOCABULARY + 3]])
    beams = beams.grown(chosen, cells.gather(1, chosen), VOCABULARY, ends)
    assert beams.nodes.tolist() == [[1, 4]]  # node 1 again; node 3 is none
    assert beams.finished.tolist() == [[True, False]]
    assert (beams.forest.scores > -torch.inf).tolist() == [[True, True, True, False, True]]
    assert beams.forest.tokens[0, 4] == 3
    assert beams.forest.depths[0, 4] == 2


def test_beams_are_drawn_without_replacement() -> None:
    """Ordered pairs of cells have the law p_i p_j / (1 - p_i); with replacement they have not."""
    rows, p = 4000, torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64)
    way = chooser(*[Sampling(temperature=1.0)] * rows)
    chosen, scores = choose_cells(p.log().expand(rows, -1), 2, way)
    assert torch.equal(scores, p.log()[chosen])
    counts = torch.bincount(chosen @ torch.tensor([4, 1]), minlength=16).double()
    law, independent = torch.zeros(4, 4, dtype=torch.float64), torch.outer(p, p)
    for i, j in itertools.permutations(range(4), 2):
        law[i, j] = p[i] * p[j] / (1 - p[i])
    assert abs(chi_square(counts, law.flatten())) < 5
    assert chi_square(counts, independent.flatten()) > 10


def test_where_nothing_is_left_no_beam_is_drawn() -> None:
    """Fewer tokens than beams: those over have no score, and no token comes twice."""
    cells = torch.tensor([[-torch.inf, 0.0, -torch.inf, -1.0, -torch.inf]])
    way = chooser(Sampling(temperature=1.0))
    chosen, scores = choose_cells(cells, 4, way)
    there = scores[0] > -torch.inf
    assert there.tolist() == [True, True, False, False]
    assert sorted(chosen[0, there].tolist()) == [1, 3]


def test_greedy_rows_beside_drawn_ones_take_the_best() -> None:
    """Each row chooses as it does alone."""
    cells = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    drawn = Sampling(temperature=1.0)
    together, _ = choose_cells(cells, 4, chooser(drawn, GREEDY, drawn))
    assert torch.equal(together[1], cells[1].topk(4).indices)
    alone, _ = choose_cells(cells[:1], 4, chooser(drawn))
    assert torch.equal(together[0], alone[0])


def test_a_penalty_counts_the_drafts_of_a_beam() -> None:
    """After each beam its own tokens, and those of the text, are less likely; no others'."""
    way = chooser(Sampling(repetition_penalty=2.0))
    way.see(torch.tensor([[0]]), torch.tensor([[True]]))
    roots = Beams.of_roots(torch.tensor([0]), torch.float64)
    first = torch.tensor([[1, 3]]), torch.tensor([[-0.1, -1.0]], dtype=torch.float64)
    beams = roots.grown(*first, VOCABULARY, ending_tokens(None, CPU))
    logits = torch.randn(1, 2, VOCABULARY, generator=torch.Generator().manual_seed(1)).double()
    found = beams.log_distributions(logits, way)
    for beam, token in enumerate((1, 3)):
        seen = torch.zeros(VOCABULARY, dtype=torch.bool)
        seen[[0, token]] = True
        expected = penalize(logits[0, beam], seen, 2.0).log_softmax(-1)
        torch.testing.assert_close(found[0, beam], expected)


def test_a_damaged_draft_model_is_told() -> None:
    """Its logits are not numbers: an error, not plain decoding without a word."""
    config = tiny_config(layers=3, future_tokens=1)
    weights = tiny_weights(config, seed=3)
    weights["trunk.embedding.weight"] = weights["trunk.embedding.weight"] * torch.nan
    for sampling in (GREEDY, Sampling(temperature=1.0)):
        way = JointModelDecoder(
            tiny_network(tiny_config()),
            drafter=tiny_network(config, weights),
            drafts=2,
            sampling=sampling,
        )
        way.prefill(tiny_prompts(), 8)
        with pytest.raises(CheckpointError, match="logits are not finite"):
            way.step()
