"""Runs whose sequences are read again before a choice: `data.review.staleness: rescore`."""

from pathlib import Path

import numpy as np
import pytest

from data_prep.loading.loader import BatchLayout, TokenLoader
from data_prep.loading.selection import KeptSequences
from data_prep.loading.sequences import SequenceFormat
from data_prep.shards.shard_set import ShardSet
from pipeline.checkpoint.folder import read_config
from tests.pipeline.conftest import written_config
from tests.support.review_runs import (
    LAYOUTS,
    LENGTH,
    ONE,
    SAVING,
    forward_losses,
    last_step_of,
    review_arrays,
    reviewed_run,
    saved_at,
)
from tests.support.training_runs import metrics_without_times

PHASES = "phases: [{name: learn}, {name: focus, drop_percent: 50}]"
RESCORE = [f"data.review={{{PHASES}, staleness: rescore, rescore_percent: 60}}"]


@pytest.fixture(scope="module")
def straight(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one rank that nothing interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    return reviewed_run(written_config(shards, folder), folder, *ONE, *RESCORE, *SAVING)


def test_losses_are_those_of_the_weights_before_the_choice(
    straight: Path, shards: Path, config: Path, tmp_path: Path
) -> None:
    """Of the 60 % that came first; the others keep theirs; resumed there, the run is the same."""
    step = last_step_of(straight, 1)
    checkpoint = saved_at(straight, step)
    assert set(review_arrays(checkpoint / "review")) == {"losses_epoch_01.npy"}
    arrays = review_arrays(straight / "review")
    learned, again = arrays["losses_epoch_01.npy"], arrays["rescored_phase_2.npy"]
    kept = arrays["kept_phase_2.npy"]
    form = SequenceFormat(LENGTH, read_config(checkpoint).model.future_tokens)
    loader = TokenLoader(ShardSet.open(shards, "train"), form, BatchLayout(1), seed=7)
    first = -(-len(learned) * 60 // 100)
    _, numbers = loader._order.locate(0, first)
    assert sorted(np.flatnonzero(again >= 0).tolist()) == sorted(numbers)
    expected = forward_losses(checkpoint, loader, 0, first)
    np.testing.assert_allclose(again[numbers], expected, rtol=2e-5)
    judgement = np.where(again >= 0, again, learned)
    dropped = len(learned) // 2
    np.testing.assert_array_equal(kept, KeptSequences.by_loss(judgement, dropped).bits)
    assert (KeptSequences.by_loss(learned, dropped).bits != kept).any()
    run_dir = reviewed_run(config, tmp_path, *ONE, *RESCORE, resume=checkpoint)
    found = review_arrays(run_dir / "review")
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
    assert metrics_without_times(run_dir) == metrics_without_times(straight)[step:]


@pytest.mark.stress
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reads_the_same(
    straight: Path, config: Path, tmp_path: Path, layout: str
) -> None:
    """From the same checkpoint at the border, to rounding."""
    world, settings = LAYOUTS[layout]
    step = last_step_of(straight, 1)
    run_dir = reviewed_run(
        config,
        tmp_path,
        *(*settings, *RESCORE, f"train.stop_at_step={step + 1}"),
        world=world,
        resume=saved_at(straight, step),
    )
    found, expected = review_arrays(run_dir / "review"), review_arrays(straight / "review")
    name = "rescored_phase_2.npy"
    np.testing.assert_allclose(found[name], expected[name], rtol=1e-4)
