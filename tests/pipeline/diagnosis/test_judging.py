"""What checks make of what ranks saw: each fault is named with its rank and its way out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.run_config import load_config
from pipeline.diagnosis import machine, network, storage, training_step
from pipeline.diagnosis.check import Check, Context, Outcome
from pipeline.diagnosis.data import data_checks
from pipeline.diagnosis.storage import kept_checkpoints
from pipeline.distributed.rendezvous import RankInfo

CONFIG = load_config(Path(__file__).parents[3] / "configs" / "quickstart.yaml")


@pytest.fixture
def context(tmp_path: Path) -> Context:
    """Of rank 0 of a job on CPUs."""
    return Context(
        CONFIG,
        RankInfo(0, 0, 1),
        torch.device("cpu"),
        "fp32",
        topology=None,
        folder=tmp_path,
        meeting="",
        full=False,
        seen_within_s=0.1,
    )


def _check(checks: tuple[Check, ...], name: str) -> Check:
    return next(check for check in checks if check.name == name)


def _judged(context: Context, checks: tuple[Check, ...], name: str, values: Any) -> Outcome:
    return _check(checks, name).judge(context, values)


def test_clocks_that_are_apart_are_named(context: Context) -> None:
    """The look with the least waiting counts."""
    near = [[100.0, 200.0], [100.9, 200.001]]
    looks = [times + [300.0] * 3 for times in near]
    assert not _judged(context, machine.CHECKS, "clocks", looks).problems
    far = [[100.0] * 5, [107.0] * 5]
    (problem,) = _judged(context, machine.CHECKS, "clocks", far).problems
    assert "the clock of rank 1 is 7.0 s ahead of that of rank 0" in problem


def test_versions_and_code_that_differ_are_named(context: Context) -> None:
    """With the ranks, and both values."""
    mine = _check(machine.CHECKS, "versions").look(context)
    assert not _judged(context, machine.CHECKS, "versions", [mine, mine]).problems
    other = mine._replace(code=mine.code | {"torch": "1.0"})
    (problem,) = _judged(context, machine.CHECKS, "versions", [mine, mine, other]).problems
    assert "rank 2 on " in problem
    assert "other code" in problem
    assert "torch" in problem


def test_devices_that_are_taken_or_shared_are_named(context: Context) -> None:
    """Too little free memory, one GPU for two ranks, other GPUs than rank 0's."""
    gpu = {"host": "a", "kind": "cuda", "name": "X", "free": 99, "total": 100, "uuid": "1"}
    fine = [gpu, gpu | {"uuid": "2"}]
    assert not _judged(context, machine.CHECKS, "devices", fine).problems
    bad = [gpu, gpu, gpu | {"uuid": "3", "free": 50}, gpu | {"uuid": "4", "name": "Y"}]
    problems = " ".join(_judged(context, machine.CHECKS, "devices", bad).problems)
    assert "ranks 0 and 1 share one GPU of a" in problems
    assert "rank 2 on a has" in problems
    assert "rank 3 have Y, rank 0 has X" in problems


def test_wrong_sums_and_transfers_are_named(context: Context) -> None:
    """By rank and host."""
    right = network._Measured(True, 0.1, "a")
    wrong = network._Measured(False, 0.1, "b")
    (problem,) = _judged(context, network.CHECKS, "all-reduce", [right, wrong]).problems
    assert "wrong sums on rank 1 (b)" in problem
    (problem,) = _judged(context, network.CHECKS, "ring", [right, wrong]).problems
    assert "rank 1 on b did not get what rank 0 on a sent" in problem
    assert not _judged(context, network.CHECKS, "ring", [right, right]).problems


def test_a_slow_link_between_gpus_is_named(context: Context) -> None:
    """On CPUs other work makes as much difference."""
    ranks = [network._Measured(True, s, f"n{r}") for r, s in enumerate((0.1, 0.1, 0.9, 0.1))]
    assert not _judged(context, network.CHECKS, "ring", ranks).problems
    on_gpus = replace(context, device=torch.device("cuda"))
    (problem,) = _judged(on_gpus, network.CHECKS, "ring", ranks).problems
    assert "the link from rank 1 on n1 to rank 2 on n2 is 9.0 times slower" in problem


def test_a_file_system_without_exclusive_creation_is_refused(context: Context) -> None:
    """As many winners as files, and renames that all see."""
    good = storage._FileSystem(4, True, 1e6, 1e6, 0.1)
    assert not _judged(context, storage.CHECKS, "file system", [good, good]).problems
    twice = good._replace(won=8, renamed=False)
    problems = _judged(context, storage.CHECKS, "file system", [good, twice]).problems
    assert "8 files were created exclusively 12 times" in problems[0]
    assert "a renamed folder is not whole on rank 1" in problems[1]


def test_rank_0_has_to_see_every_ranks_file(context: Context) -> None:
    """Those that it does not see are on another folder of the same name."""
    (context.folder / "seen_0").touch()
    (problem,) = storage.SHARED.judge(context, ["a", "b"]).problems
    assert "rank 0 does not see the files of rank 1 (on b)" in problem
    (context.folder / "seen_1").touch()
    assert not storage.SHARED.judge(context, ["a", "b"]).problems


def test_room_for_every_checkpoint_that_is_kept(context: Context) -> None:
    """The fullest node counts, and names of files as well as bytes."""
    enough = (10**12, 10**6)
    assert not _judged(context, storage.CHECKS, "disk", [enough, enough]).problems
    each = 12 * CONFIG.model.num_parameters()
    little = (each * kept_checkpoints(CONFIG) - 1, 3)
    problems = _judged(context, storage.CHECKS, "disk", [enough, little]).problems
    assert "3 checkpoints of" in problems[0]
    assert "room for 3 more files" in problems[1]


def test_checkpoints_that_are_kept_are_counted() -> None:
    """The newest, one that is being written, those for good and the best; never more than saves."""
    config = load_config(
        Path(__file__).parents[3] / "configs" / "7b.yaml",
        ["checkpoint.every_steps=500", "checkpoint.keep=3", "checkpoint.keep_every=5000"],
    )
    assert kept_checkpoints(config) == 3 + 1 + 25000 // 5000 + 1
    assert kept_checkpoints(load_config(_seven(), ["train.stop_at_step=500"])) == 2


def _seven() -> Path:
    return Path(__file__).parents[3] / "configs" / "7b.yaml"


@pytest.mark.parametrize("difference", [0.5, float("nan")])
def test_a_gradient_that_is_off_is_named(context: Context, difference: float) -> None:
    """Also one that is not a number."""
    checks = training_step.training_checks(0)
    good = training_step._Compared("trunk.x", 1e-6, 9)
    assert not _judged(context, checks, "gradients", [good, None]).problems
    bad = good._replace(difference=difference)
    (problem,) = _judged(context, checks, "gradients", [bad, None]).problems
    assert "the gradient of trunk.x in this layout" in problem


def test_shards_are_read_whole_when_asked(context: Context) -> None:
    """By the function that the command gives; its lines are the problems."""
    checks = data_checks(lambda path: [f"{path}: shard 3 is damaged"])
    check = _check(checks, "shards")
    assert not check.judge(context, [check.look(context)]).problems
    full = replace(context, full=True)
    (problem,) = check.judge(full, [check.look(full)]).problems
    assert "shard 3 is damaged; make or copy the shards again" in problem
