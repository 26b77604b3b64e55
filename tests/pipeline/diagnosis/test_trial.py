"""The small model that stands for a run: the same layout and heads, in a moment."""

from pathlib import Path

import pytest
import torch

from pipeline.config.run_config import Precision, load_config, world_problems
from pipeline.diagnosis.trial import one_process_config, trial_batches, trial_config

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tensor", [1, 2])
def test_a_trial_has_the_layout_of_its_run(path: Path, precision: Precision, tensor: int) -> None:
    """Tensor size, stages and what they hold, ZeRO, heads; and is small."""
    config = load_config(path, [f"parallel.tensor={tensor}"])
    trial = trial_config(config, "tiny", precision)
    assert trial.parallel.tensor == tensor
    assert trial.parallel.zero == config.parallel.zero
    assert trial.train.precision == precision
    assert trial.model.future_tokens == config.model.future_tokens
    held = [(bool(part.trunk_layers), part.heads) for part in trial.stage_plan]
    assert held == [(bool(part.trunk_layers), part.heads) for part in config.stage_plan]
    assert trial.model.num_parameters() < 2_000_000
    ranks = 4 * tensor * len(config.stage_plan)
    assert world_problems(trial, ranks) == world_problems(config, ranks)
    assert trial.optimizer.gradient_clipping == 0


def test_a_trial_at_full_width_keeps_all_sizes_but_the_layers() -> None:
    """And the micro-batch."""
    config = load_config(CONFIGS[0].parent / "7b_staged.yaml")
    trial = trial_config(config, "own", "bf16")
    changed = {"layers": trial.model.layers}
    assert trial.model == config.model.model_copy(update=changed)
    assert trial.model.layers == 4 + config.model.future_tokens
    assert trial.batch.micro_size == config.batch.micro_size
    assert trial.data.sequence_length == config.data.sequence_length
    assert trial.stage_plan[0].trunk_layers == range(0, 1)


def test_one_process_gets_what_all_ranks_get() -> None:
    """Each sample once, on some rank."""
    trial = trial_config(load_config(CONFIGS[0].parent / "quickstart.yaml"), "tiny", "fp32")
    alone = one_process_config(trial)
    dealt = torch.cat(
        [batch.tokens for rank in range(3) for batch in trial_batches(trial, 0, rank, 3)]
    )
    assert dealt.shape[0] == 3 * trial.batch.accumulation
    assert len({tuple(row.tolist()) for row in dealt}) == dealt.shape[0]
    again = torch.cat(
        [batch.tokens for rank in range(3) for batch in trial_batches(alone, 0, rank, 3)]
    )
    assert torch.equal(again, dealt)
    assert alone.parallel.tensor == 1
    assert len(alone.stage_plan) == 1
