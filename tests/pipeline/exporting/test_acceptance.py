"""Agreement of the heads, measured at export: the figure that validation gives during training."""

from pathlib import Path

import pytest
import torch

from data_prep.shards.shard_set import ShardSet
from model.errors import CheckpointError
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
    assert torch.equal(head_predictions(tiny_network(config), tokens).transpose(1, 2), expected)


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


def test_other_shards_are_not_measured_on(config: Path, tmp_path: Path) -> None:
    """Tokens of another tokenizer would be other text."""
    run = run_config(config)
    with pytest.raises(CheckpointError, match=r"has another tokenizer\.json by now"):
        measure_acceptance(tmp_path, run, describe(run.model), b"{}")
