"""Which checkpoints stay, and that nothing goes too early."""

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import ConfigError
from pipeline.checkpoint.file_names import FOLDER, committed, step_folder, step_of
from pipeline.checkpoint.files import verify
from pipeline.checkpoint.folder import CheckpointFolder
from pipeline.checkpoint.retention import Candidate, eval_loss, superfluous
from pipeline.config.run_config import load_config
from pipeline.config.sections import CheckpointSection
from tests.support.checkpoint_cases import commit


def _steps(run_dir: Path) -> list[int | None]:
    return [step_of(path) for path in committed(run_dir / FOLDER)]


def test_the_docstring_example() -> None:
    """The newest, every M-th and the best stay."""
    losses = {500: 3.1, 1000: 3.2, 1500: 3.0, 2000: 3.1, 2500: 3.3, 3000: 3.2}
    found = [Candidate(step, loss) for step, loss in losses.items()]
    options = CheckpointSection(every_steps=500, keep=2, keep_every=1000, keep_best=1)
    assert superfluous(found, options) == [500]


@settings(max_examples=60, deadline=None)
@given(
    steps=st.sets(st.integers(1, 60), max_size=20),
    losses=st.lists(st.sampled_from([None, float("nan"), 1.0, 2.0, 3.0]), min_size=20, max_size=20),
    keep=st.integers(2, 4),
    every=st.integers(0, 9),
    best=st.integers(0, 3),
)
def test_what_stays(
    steps: set[int], losses: list[float | None], keep: int, every: int, best: int
) -> None:
    """The newest `keep` always; all multiples; and of those as good as one that goes, enough."""
    found = [Candidate(step, loss) for step, loss in zip(sorted(steps), losses, strict=False)]
    options = CheckpointSection(every_steps=1, keep=keep, keep_every=every, keep_best=best)
    going = set(superfluous(found, options))
    assert not going & set(sorted(steps)[-keep:])
    assert not any(every and step % every == 0 for step in going)
    judged = {one.step: one.eval_loss for one in found if (one.eval_loss or 0) > 0}
    for step in going & judged.keys():
        better = [other for other, loss in judged.items() if (loss or 0) <= (judged[step] or 0)]
        assert len(set(better) - going) >= best
    if not every and not best:
        assert len(found) - len(going) == min(keep, len(found))


def test_folders_go_one_by_one(tmp_path: Path) -> None:
    """After each commit exactly those are there that the policy names, all of them whole."""
    options = CheckpointSection(every_steps=2, keep=2, keep_every=6, keep_best=1)
    losses = {2: 3.0, 4: 1.0, 6: 2.0, 8: 2.5, 10: 2.5, 12: 4.0, 14: 4.0, 16: 4.0}
    there = {}
    for step, loss in losses.items():
        commit(tmp_path, step, options, eval_loss=loss)
        there[step] = _steps(tmp_path)
    assert there[6] == [4, 6]
    assert there[10] == [4, 6, 8, 10]
    assert there[16] == [4, 6, 12, 14, 16]
    assert all(verify(path) == [] for path in committed(tmp_path / FOLDER))
    assert not list((tmp_path / FOLDER).glob("*.partial"))


def test_damaged_ones_do_not_count(tmp_path: Path) -> None:
    """The newest N are N whole ones: where one has lost a file, an older one stays for it."""
    options = CheckpointSection(every_steps=2, keep=2)
    for step in (2, 4):
        commit(tmp_path, step, options)
    os.truncate(step_folder(tmp_path / FOLDER, 4) / "tensors" / "rank_00001.safetensors", 10)
    commit(tmp_path, 6, options)
    assert _steps(tmp_path) == [2, 4, 6]
    commit(tmp_path, 8, options)
    assert _steps(tmp_path) == [6, 8]


def test_nothing_goes_before_the_new_one_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file and folder of a checkpoint is synced before it is renamed, and then deletions."""
    options = CheckpointSection(every_steps=2, keep=2)
    for step in (2, 4):
        commit(tmp_path, step, options)
    events: list[tuple[str, str]] = []
    sync, rename = os.fsync, Path.rename

    def recorded_sync(descriptor: int) -> None:
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def recorded_rename(path: Path, target: Path) -> Path:
        events.append(("rename", str(path)))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", recorded_sync)
    monkeypatch.setattr(Path, "rename", recorded_rename)
    final = commit(tmp_path, 6, options)
    partial = str(final.with_name(final.name + ".partial"))
    place = events.index(("rename", partial))
    synced = {path for event, path in events[:place] if event == "sync"}
    written = [final, final / "tensors", *(path for path in final.rglob("*") if path.is_file())]
    for path in written:
        assert str(path).replace(str(final), partial) in synced, path
    assert ("sync", str(final.parent)) in events[place:]
    assert events.index(("rename", str(step_folder(final.parent, 2)))) > place


def test_leftovers_of_kills_go_before_a_save(tmp_path: Path) -> None:
    """What a killed save left is deleted before the next one needs its room."""
    options = CheckpointSection()
    left = commit(tmp_path, 2, options)
    partial = left.with_name(left.name + ".partial")
    shutil.move(left, partial)
    commit(tmp_path, 4, options)
    assert not partial.exists()


def test_nothing_is_deleted_through_links(tmp_path: Path) -> None:
    """A checkpoint that is a link to elsewhere never goes, nor do files behind links in one."""
    options = CheckpointSection(every_steps=2, keep=2)
    elsewhere = commit(tmp_path / "other", 2, options)
    linked = step_folder(tmp_path / "run" / FOLDER, 2)
    linked.parent.mkdir(parents=True)
    linked.symlink_to(elsewhere)
    inner = commit(tmp_path / "run", 4, options)
    shutil.move(inner / "tensors", tmp_path / "tensors")
    (inner / "tensors").symlink_to(tmp_path / "tensors")
    for step in (6, 8, 10):
        commit(tmp_path / "run", step, options)
    assert linked.is_symlink()
    assert verify(elsewhere) == []
    assert _steps(tmp_path / "run") == [2, 8, 10]
    assert len(list((tmp_path / "tensors").iterdir())) == 2


def test_only_what_saves_wrote_is_deleted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Notes in a checkpoint, and folders that are merely named like a save, outlive retention."""
    options = CheckpointSection(every_steps=2, keep=2)
    noted = commit(tmp_path, 2, options)
    (noted / "notes.txt").write_text("the good one")
    checkpoints = tmp_path / FOLDER
    (checkpoints / "step_backup.partial").mkdir()
    (checkpoints / "step_backup.partial" / "state.json").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "state.json").write_text("mine")
    (checkpoints / "step_00000099.partial").symlink_to(tmp_path / "mine")
    for step in (4, 6, 8):
        commit(tmp_path, step, options)
    left = noted.with_name(noted.name + ".partial")
    assert [path.name for path in left.iterdir()] == ["notes.txt"]
    assert "no save wrote notes.txt" in caplog.text
    assert (checkpoints / "step_backup.partial" / "state.json").read_text() == "mine"
    assert (checkpoints / "step_00000099.partial").is_symlink()
    assert (tmp_path / "mine" / "state.json").read_text() == "mine"
    assert _steps(tmp_path) == [6, 8]


def test_a_save_does_not_go_through_a_link(tmp_path: Path) -> None:
    """What lies under the name of the save's folder and is not a save's refuses the save."""
    (tmp_path / "mine").mkdir()
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "step_00000002.partial").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="is in the way, and no save made it"):
        commit(tmp_path, 2, CheckpointSection())
    assert list((tmp_path / "mine").iterdir()) == []


def test_the_newer_of_two_saves_of_a_step_is_kept(tmp_path: Path) -> None:
    """Saved again with other content, a step's earlier checkpoint is set aside, not the new one."""
    options = CheckpointSection()
    commit(tmp_path, 2, options, eval_loss=1.0)
    final = commit(tmp_path, 2, options, eval_loss=2.0)
    assert eval_loss(final) == 2.0
    aside = final.with_name(f"superseded_{final.name}")
    assert eval_loss(aside) == 1.0
    assert verify(final) == verify(aside) == []
    commit(tmp_path, 2, options, eval_loss=2.0)  # the same again is no other save
    names = {path.name for path in final.parent.iterdir()}
    assert names == {"latest", final.name, aside.name}


@pytest.mark.parametrize("relative", [True, False])
def test_links_of_an_earlier_run_are_moved_as_links(tmp_path: Path, relative: bool) -> None:
    """A new run in the folder takes a linked checkpoints folder along; it still leads there."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / FOLDER).symlink_to("../scratch" if relative else scratch)
    final = commit(run_dir, 2, CheckpointSection())
    moved = CheckpointFolder(run_dir, CheckpointSection()).set_aside(run_dir)
    assert moved is not None
    assert verify(moved / FOLDER / final.name) == []
    assert verify(scratch / final.name) == []
    assert not (run_dir / FOLDER).is_symlink()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["checkpoint.keep=1"], ["keep=1 must be at least 2", "verified"]),
        (["checkpoint.keep_every=70"], ["multiple of checkpoint.every_steps=50", "50 or 100"]),
        (["checkpoint.every_steps=0", "checkpoint.keep_every=9"], ["keeps nothing"]),
        (["checkpoint.keep_best=1", "eval.every_steps=0"], ["needs validation losses"]),
        (["checkpoint.keep_best=1", "eval.every_steps=20"], ["not all validated", "multiple"]),
        (["checkpoint.on_error=ignore"], ["use one of: warn or stop"]),
    ],
)
def test_policies_that_cannot_be_kept_are_refused(settings: list[str], words: list[str]) -> None:
    """Each with its reason and what to do."""
    quickstart = Path(__file__).parents[3] / "configs" / "quickstart.yaml"
    with pytest.raises(ConfigError) as caught:
        load_config(quickstart, settings)
    assert all(word in str(caught.value) for word in words), caught.value
