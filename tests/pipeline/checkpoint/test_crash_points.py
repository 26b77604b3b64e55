"""Real runs of two ranks killed at every point of a save: none loses more than the steps since."""

import random
from pathlib import Path

import pytest

from pipeline.checkpoint.crash_points import (
    DELETION_POINTS,
    EVERY_RANK_POINTS,
    MAIN_RANK_POINTS,
    POINTS,
    VARIABLE,
    crash_point,
    saving,
)
from pipeline.checkpoint.file_names import FOLDER, LATEST, committed
from tests.support.crash_runs import assert_same_run, assert_whole, crash, go_on, kill_at_random
from tests.support.long_forms import part_of
from tests.support.training_runs import CONFIG, run_job

WORLD = 2
SETTINGS = ["checkpoint.every_steps=2", "batch.micro_size=2", "eval.every_steps=2"]
# Past these the new checkpoint has its name and counts.
COMMITTED = {*MAIN_RANK_POINTS[MAIN_RANK_POINTS.index("after-rename") :], *DELETION_POINTS}
# One chain of crashes each: the point, whether all ranks end, and the checkpoint that is left.
CHAINS: dict[str, list[tuple[str, bool, int | None]]] = {
    "asynchronous": [
        ("weights-half-written:1@2", False, None),
        ("before-manifest@4", True, 2),
        ("after-rename@6", False, 6),
        ("during-deletion@8", True, 8),
    ],
    "synchronous": [
        ("manifest-half-written@4", False, 2),
        ("latest-half-written@6", True, 6),
        ("after-snapshot:1@8", False, 6),
    ],
}


@pytest.fixture(scope="module")
def straight(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to."""
    folder = tmp_path_factory.mktemp("straight")
    arguments = _arguments(_write_config(shards, folder), folder / "run", "synchronous")
    assert run_job(folder, arguments, world=WORLD).codes == [0] * WORLD
    return folder / "run"


def _write_config(shards: Path, folder: Path) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(CONFIG.replace("shards: unset", f"shards: {shards}"))
    return path


def _arguments(config: Path, run_dir: Path, mode: str, *more: str) -> list[str]:
    flag = "true" if mode == "asynchronous" else "false"
    settings = [*SETTINGS, f"checkpoint.asynchronous={flag}", *more]
    return [str(config), "--set", f"run.dir={run_dir}", *settings]


def _resumed_step(output: str) -> int | None:
    """The step that a run says it goes on from; None for a new one."""
    if "new run: step 0" in output:
        return None
    return int(output.partition("resumed from ")[2].partition(": step ")[2].partition(",")[0])


@pytest.mark.parametrize("mode", part_of(CHAINS, lambda _, mode: mode == "asynchronous"))
def test_killed_at_points_of_saves(config: Path, straight: Path, tmp_path: Path, mode: str) -> None:
    """One save after the other ends at a named point: nothing but the steps since is lost.

    Each run goes on from the newest complete checkpoint, and in the end metrics and weights are
    those of the run without crashes.
    """
    run_dir = tmp_path / "run"
    arguments = _arguments(config, run_dir, mode)
    left: int | None = None
    for number, (where, all_ranks, step) in enumerate(CHAINS[mode]):
        outcome = crash(tmp_path, arguments, where, world=WORLD, all_ranks=all_ranks)
        assert_whole(run_dir)
        if number:
            assert _resumed_step(outcome.output[0]) == left
        left = step
    assert _resumed_step(go_on(tmp_path, arguments, world=WORLD).output[0]) == left
    assert_same_run(straight, run_dir)
    names = sorted(path.name for path in (run_dir / FOLDER).iterdir())
    assert names == [LATEST, "step_00000010", "step_00000012"]


def _cases() -> list[tuple[str, str]]:
    """Every point, and who ends there: rank 0, the other rank, or all."""
    ranks = [(point, who) for point in EVERY_RANK_POINTS for who in ("0", "1", "all")]
    main = [(point, who) for point in MAIN_RANK_POINTS + DELETION_POINTS for who in ("0", "all")]
    return ranks + main


@pytest.mark.stress
@pytest.mark.parametrize("mode", CHAINS)
@pytest.mark.parametrize(("point", "who"), _cases())
def test_killed_at_every_point(
    config: Path, straight: Path, tmp_path: Path, mode: str, point: str, who: str
) -> None:
    """The long form: every point, on each rank and on all, with both ways of saving."""
    run_dir = tmp_path / "run"
    arguments = _arguments(config, run_dir, mode)
    if point == "between-deletions":  # more than one goes only when fewer are to stay than before
        before = _arguments(config, run_dir, mode, "checkpoint.keep=4", "train.stop_at_step=6")
        assert run_job(tmp_path, before, world=WORLD).codes == [0] * WORLD
        where, step = f"{point}@8", 8
    else:
        where, step = f"{point}{'' if who == 'all' else f':{who}'}@6", 6
    crash(tmp_path, arguments, where, world=WORLD, all_ranks=who == "all")
    assert_whole(run_dir)
    resumed = _resumed_step(go_on(tmp_path, arguments, world=WORLD).output[0])
    if point in COMMITTED or (point == "after-commit" and who != "1"):
        assert resumed == step
    elif who == "1" and point in ("after-agreement", "after-commit"):
        assert resumed in (step - 2, step)  # rank 0 was committing meanwhile
    else:
        assert resumed == step - 2
    assert_same_run(straight, run_dir)
    assert len(committed(run_dir / FOLDER)) == 2


@pytest.mark.stress
@pytest.mark.parametrize("mode", CHAINS)
@pytest.mark.parametrize("seed", range(5))
def test_killed_at_random_moments(
    config: Path, straight: Path, tmp_path: Path, mode: str, seed: int
) -> None:
    """SIGKILL at moments that nobody chose, again and again until the run has come to its end."""
    run_dir = tmp_path / "run"
    arguments = _arguments(config, run_dir, mode)
    moments = random.Random(seed)
    for _ in range(4):
        kill_at_random(tmp_path, arguments, run_dir, moments, world=WORLD, last=12)
        assert_whole(run_dir)
    go_on(tmp_path, arguments, world=WORLD)
    assert_same_run(straight, run_dir)


def test_points_are_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are more than 12 points; one that does not exist is refused, another one passed."""
    assert len(set(POINTS)) == len(POINTS) >= 12
    monkeypatch.setenv(VARIABLE, "before-lunch")
    with pytest.raises(ValueError, match="before-lunch"):
        crash_point("after-rename")
    for elsewhere in ("after-rename:1", "after-rename@4", "after-latest"):
        monkeypatch.setenv(VARIABLE, elsewhere)
        with saving(3):
            crash_point("after-rename")
