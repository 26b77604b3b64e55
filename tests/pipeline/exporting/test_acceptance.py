"""Agreement of the heads, measured at export: the figure that validation gives during training."""

import itertools
from pathlib import Path

import pytest
import torch

from data_prep.shards.shard_set import ShardSet
from model.decoding.tree import Tree
from model.errors import CheckpointError
from model.operations.agreement import tree_counts
from pipeline.config.run_config import RunConfig, load_config
from pipeline.data.validation import ValidationSamples
from pipeline.engine.evaluation import EvalResult, evaluate_heads
from pipeline.exporting.acceptance import head_predictions, measure_acceptance
from pipeline.exporting.writing import write_export
from tests.support.tiny_export import byte_tokenizer, describe
from tests.support.tiny_model import (
    head_logits,
    tiny_config,
    tiny_model,
    tiny_network,
    tiny_weights,
)

SIZES = {"vocab_size": 260, "layers": 5, "future_tokens": 3}


def run_config(path: Path) -> RunConfig:
    """The tiny run with a model whose heads are trained for nothing."""
    config = load_config(path, [])
    return config.model_copy(update={"model": tiny_config(**SIZES)})


def test_predictions_are_those_of_the_training_form() -> None:
    """Every head at every position of several sequences."""
    config = tiny_config(**SIZES)
    tokens = torch.randint(260, (3, 70), generator=torch.Generator().manual_seed(1))
    expected = head_logits(tiny_model(config), tokens).argmax(-1)
    predictions, ranks = head_predictions(tiny_network(config), tokens)
    assert torch.equal(predictions.transpose(1, 2), expected)
    logits = head_logits(tiny_model(config), tokens)
    for head, row, place in itertools.product(range(3), range(3), range(68)):
        wanted = int(expected[0, row, place + head])
        order = logits[head, row, place].argsort(descending=True).tolist()
        assert int(ranks[head, place, row]) == order.index(wanted)


def test_trees_are_counted_by_their_paths() -> None:
    """Against the shapes of the trees that decode, position by position."""
    generator = torch.Generator().manual_seed(2)
    ranks = torch.randint(4, (3, 40, 2), generator=generator)
    ranks[0] = 0
    valid = torch.rand(3, 40, 2, generator=generator) < 0.9
    found = tree_counts(ranks, valid, 2)
    for spread in (1, 2):
        tree = Tree(3, spread, torch.device("cpu"))
        wanted = [0, 0, 0]
        for place, row in itertools.product(range(38), range(2)):
            node = 0
            for head in range(3):
                if head:
                    rank = int(ranks[head, place, row])
                    node = int(tree.children[node, rank]) if rank <= spread else -1
                if node < 0 or not valid[head, place, row]:
                    break
                wanted[head] += 1
        assert found[spread - 1].tolist() == wanted


def test_it_is_what_validation_measures(config: Path, tmp_path: Path) -> None:
    """The same held-out sequences give the same expected tokens per forward."""
    run = run_config(config)
    shards = ShardSet.open(run.data.shards, run.data.eval_split)
    tokenizer = shards.open_tokenizer().content
    folder, description = tmp_path / "export", describe(run.model)
    write_export(folder, description, tiny_weights(run.model).items(), tokenizer=byte_tokenizer())
    found = measure_acceptance(folder, run, description, tokenizer)
    model = tiny_model(run.model, dtype=torch.float32)
    with torch.no_grad():
        sums = sum(
            evaluate_heads(model, model(batch.tokens), batch, chunk_tokens=64)
            for batch in ValidationSamples(run, shards, data_rank=0, data_size=1)
        )
    assert isinstance(sums, torch.Tensor)
    expected = EvalResult.from_sums(sums).tokens_per_forward
    assert found.tokens_per_forward(3) == pytest.approx(expected)
    assert found.agreed[0] > found.agreed[1] > 0
    for narrow, wide in itertools.pairwise((found.agreed, *found.within)):
        assert wide[0] == narrow[0]
        assert all(more >= less for more, less in zip(wide, narrow, strict=True))
    assert found.tokens_per_forward(3, 2) > found.tokens_per_forward(3, 1) > expected


def test_other_shards_are_not_measured_on(config: Path, tmp_path: Path) -> None:
    """Tokens of another tokenizer would be other text."""
    run = run_config(config)
    with pytest.raises(CheckpointError, match=r"has another tokenizer\.json by now"):
        measure_acceptance(tmp_path, run, describe(run.model), b"{}")
