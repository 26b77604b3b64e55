"""Checkpoints of any content: what reads them gives what is there, or one clear error."""

import shutil
from pathlib import Path

import pytest
from hypothesis import strategies as st

from foundation.durable_files import FileEntry, entry_of
from pipeline import commands, inspect
from pipeline.checkpoint.coverage import KINDS
from pipeline.checkpoint.file_names import FOLDER, MANIFEST, WEIGHTS, step_folder
from pipeline.checkpoint.files import write_manifest
from pipeline.checkpoint.folder import CheckpointFolder, read_config
from pipeline.checkpoint.sharded_tensors import StateFiles
from pipeline.checkpoint.train_state import read_state
from pipeline.config.sections import CheckpointSection
from tests.support.damage import DAMAGES, Damage, damaged_copy
from tests.support.hostile import call_command, fuzzed, refusal_of, untouched

VERSIONS = Path(__file__).parents[1] / "pipeline" / "checkpoint" / "versions"
STEP = 3


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one whole checkpoint, which this version reads."""
    run_dir = tmp_path_factory.mktemp("checkpoints") / "run"
    shutil.copytree(VERSIONS / "manifest_2", run_dir)
    assert refusal_of(lambda: resume(run_dir)) is None
    assert inspect.main([str(run_dir), "--verify"]) == 0
    return run_dir


def resume(run_dir: Path) -> None:
    """Read a checkpoint as a run that goes on from it does: verify, then state, run and tensors."""
    found = CheckpointFolder(run_dir, CheckpointSection()).find("auto", report=print)
    if found is None:
        return
    read_state(found)
    config = read_config(found)
    files = StateFiles(found / WEIGHTS, config.model)
    for name in files.names():
        for kind in KINDS:
            files.whole(kind, name)


def seal(checkpoint: Path) -> None:
    """Write a manifest of what is there, as somebody would who wants it to be believed."""
    entries = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and not path.is_symlink() and path.name != MANIFEST:
            entries[path.relative_to(checkpoint).as_posix()] = entry_of(path.read_bytes())
        elif path.is_symlink() or (not path.is_dir() and path.name != MANIFEST):
            entries[path.relative_to(checkpoint).as_posix()] = FileEntry(0, entry_of(b"").xxh3)
    if not (checkpoint / MANIFEST).is_dir():
        (checkpoint / MANIFEST).unlink(missing_ok=True)
        write_manifest(checkpoint, entries)


@fuzzed(
    60,
    damages=st.lists(DAMAGES, min_size=1, max_size=2),
    sealed=st.booleans(),
    verified=st.booleans(),
)
def test_any_checkpoint(run_dir: Path, damages: list[Damage], sealed: bool, verified: bool) -> None:
    """Damage of every kind to every file, with a manifest that knows it not, or that hides it."""
    with damaged_copy(run_dir, *damages) as copy:
        checkpoint = step_folder(copy / FOLDER, STEP)
        if sealed:
            seal(checkpoint)
        with untouched(copy.parent):
            refusal_of(lambda: resume(copy))
            for path in (copy, checkpoint):
                call_command(inspect.main, [str(path), *(["--verify"] if verified else [])])


@pytest.mark.parametrize("how", ["pipe", "device", "linked"])
def test_what_is_no_file_of_the_checkpoint_is_named(run_dir: Path, how: str) -> None:
    """Even when the manifest lists it with the size and checksum that a device seems to have."""
    for file, name in ((1, "config.yaml"), (3, "state.json"), (5, "tokenizer.json")):
        with damaged_copy(run_dir, Damage(file, how, 0, 0)) as copy:
            checkpoint = step_folder(copy / FOLDER, STEP)
            seal(checkpoint)
            ended = call_command(inspect.main, [str(checkpoint), "--verify"])
            assert ended.code == 1
            assert f"{name} is not a regular file in the checkpoint" in ended.output


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a\x00b", "tensors/../../x", "\x1b[2J", "x" * 300]
)
def test_names_in_the_manifest_stay_inside(run_dir: Path, name: str) -> None:
    """A manifest with such a name is damaged; nothing is looked for there."""
    with damaged_copy(run_dir) as copy:
        checkpoint = step_folder(copy / FOLDER, STEP)
        write_manifest(checkpoint, {name: entry_of(b"")})
        ended = call_command(inspect.main, [str(checkpoint)])
        assert ended.code == 1
        assert "DAMAGED: manifest.json is damaged" in ended.output


@pytest.mark.parametrize(
    "latest", ["../elsewhere/step_00000003", "/step_00000003", "step_" + "9" * 5000, "\x00"]
)
def test_latest_names_a_checkpoint_beside_it(run_dir: Path, latest: str) -> None:
    """A path, or a number of thousands of digits, is no name of a checkpoint."""
    with damaged_copy(run_dir) as copy:
        shutil.copytree(copy / FOLDER, copy / "elsewhere")
        (copy / FOLDER / "latest").write_text(latest)
        ended = call_command(inspect.main, [str(copy)])
        assert f"checkpoint    {step_folder(copy / FOLDER, STEP)}" in ended.output


@pytest.mark.parametrize("command", ["inspect", "report", "export"])
@pytest.mark.parametrize("path", ["x" * 5000, "a/" * 3000, "/proc/self/mem", "/dev/zero"])
def test_paths_that_are_none(tmp_path: Path, command: str, path: str) -> None:
    """Too long for a file system, or something that is no folder."""
    given = [path, str(tmp_path / "out")] if command == "export" else [path]
    assert call_command(commands.main, [command, *given]).code != 0
    assert list(tmp_path.iterdir()) == []
