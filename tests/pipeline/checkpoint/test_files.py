"""A checkpoint's files: anything that is not as it was written is found, and named."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import CheckpointError
from pipeline.checkpoint.file_names import FOLDER, LATEST, MANIFEST, committed, step_folder
from pipeline.checkpoint.files import (
    checkpoint_path,
    newest_checkpoint,
    read_manifest,
    size_problems,
    verify,
)
from pipeline.config.sections import CheckpointSection
from tests.support.checkpoint_cases import commit
from tests.support.hostile import check_message

FILES = [
    MANIFEST,
    "state.json",
    "config.yaml",
    "tokenizer.json",
    "tensors/rank_00000.safetensors",
    "tensors/rank_00001.safetensors",
]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A whole checkpoint."""
    return commit(tmp_path / "run", 4, CheckpointSection())


def test_a_whole_one_lists_all_its_files(checkpoint: Path) -> None:
    """The manifest names every other file, and nothing is wrong."""
    assert sorted(read_manifest(checkpoint)) == sorted(FILES[1:])
    assert verify(checkpoint) == []


@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_and_named(checkpoint: Path, name: str) -> None:
    """A flipped bit, a lost end and a lost file, of each kind of file."""
    path = checkpoint / name
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    path.write_bytes(flipped)
    assert verify(checkpoint)[0].startswith(name)
    if name != MANIFEST:
        assert size_problems(checkpoint) == []  # only its checksum can tell
    path.write_bytes(content[: len(content) // 2])
    assert size_problems(checkpoint)[0].startswith(name)
    path.unlink()
    assert size_problems(checkpoint) == [f"{name} is missing"]
    path.write_bytes(content)
    assert verify(checkpoint) == []


def test_a_strange_tensor_file_is_named(checkpoint: Path) -> None:
    """A file of another layout beside the others would be read with them, so it is refused."""
    (checkpoint / "tensors" / "rank_00002.safetensors").write_bytes(b"")
    assert verify(checkpoint) == ["tensors/rank_00002.safetensors does not belong to it"]


@settings(max_examples=60, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flip_in_the_manifest_shows(
    place: float, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Wherever a bit of the list flips: it is refused, or says the same as before."""
    folder = tmp_path_factory.getbasetemp() / "manifest"
    if not folder.exists():
        commit(folder, 1, CheckpointSection())
    path = step_folder(folder / FOLDER, 1) / MANIFEST
    whole = path.read_bytes()
    before = read_manifest(path.parent)
    flipped = bytearray(whole)
    flipped[int(place * len(whole))] ^= 1 << bit
    path.write_bytes(flipped)
    try:
        assert read_manifest(path.parent) == before
    except CheckpointError as error:
        assert str(error) == f"{MANIFEST} is damaged"  # noqa: PT017 - either is right
    finally:
        path.write_bytes(whole)


def test_a_path_names_a_checkpoint(tmp_path: Path) -> None:
    """A run, its checkpoints folder and a checkpoint itself; else an error that shows a path."""
    run = tmp_path / "run"
    for step in (2, 4):
        commit(run, step, CheckpointSection())
    newest = step_folder(run / FOLDER, 4)
    assert checkpoint_path(run) == checkpoint_path(run / FOLDER) == newest
    older = step_folder(run / FOLDER, 2)
    assert checkpoint_path(older) == older
    with pytest.raises(CheckpointError, match=r"is not a checkpoint: .*give a folder such as"):
        checkpoint_path(tmp_path)


def test_a_path_that_no_file_system_takes_is_refused() -> None:
    """A name of thousands of letters is an error as any other path that is none."""
    with pytest.raises(CheckpointError, match="File name too long") as caught:
        checkpoint_path(Path("x" * 5000))
    check_message(str(caught.value))


def test_latest_is_not_trusted(tmp_path: Path) -> None:
    """Missing, torn or naming what is gone: the highest step counts."""
    folder = tmp_path / "run" / FOLDER
    for step in (2, 4):
        commit(tmp_path / "run", step, CheckpointSection())
    latest = folder / LATEST
    for content in (b"step_00000006\n", b"step_0000", b"", b"..\n", b"\xff\xfe"):
        latest.write_bytes(content)
        assert newest_checkpoint(folder) == step_folder(folder, 4)
    latest.unlink()
    assert newest_checkpoint(folder) == step_folder(folder, 4)
    latest.write_text("step_00000002\n")
    assert newest_checkpoint(folder) == step_folder(folder, 2)


def test_only_steps_are_checkpoints(tmp_path: Path) -> None:
    """Folders that are being written, were set aside, or are something else do not count."""
    folder = tmp_path / FOLDER
    for name in ("step_00000002.partial", "superseded_step_00000003", "step_x", "step_00000010"):
        (folder / name).mkdir(parents=True)
    (folder / "step_100000000").mkdir()  # nine digits come after eight
    (folder / "step_00000011").write_text("a file")
    assert [path.name for path in committed(folder)] == ["step_00000010", "step_100000000"]


def test_an_unknown_version_is_no_checkpoint(checkpoint: Path) -> None:
    """A list of another version is not guessed at."""
    path = checkpoint / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 1}))
    assert verify(checkpoint) == [f"{MANIFEST} is damaged"]
