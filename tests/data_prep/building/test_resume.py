"""A resumed build checks what it finds."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep.building import build as build_module
from data_prep.building import dedup, prepare
from data_prep.shards.manifest import Manifest

Build = Callable[..., Manifest]
Write = Callable[..., Path]
ReadTree = Callable[[Path], dict[str, bytes]]


def change_digit(path: Path, after: bytes) -> None:
    """Another digit behind the first occurrence of some bytes."""
    content = bytearray(path.read_bytes())
    position = content.index(after) + len(after)
    content[position] = ord("7") if content[position] != ord("7") else ord("5")
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("journal/units.jsonl", b'"jsonl",'),
        ("journal/units.jsonl", b"],0,"),
        ("journal/00001.json", b'"records":'),
        ("journal/00001.json", b'"text_bytes":'),
        ("journal/00001.json", b'"file_xxh3_128":"'),
        ("shards/train/corpus/00001.arrow", b"eos_id"),
        ("shards/train/corpus/00001.arrow", b"one after each"),
    ],
)
def test_what_an_earlier_run_wrote_is_not_believed(
    tmp_path: Path, texts: list[str], write_jsonl: Write, build_set: Build, read_tree: ReadTree,
    name: str, after: bytes,
) -> None:  # fmt: skip
    """One digit of the journal or of a shard changed before the resume: the set is the same."""
    path = write_jsonl(texts)
    build_set(path, unit_bytes=8000)
    expected = read_tree(tmp_path / "out")
    for lost in ("manifest.json", "journal/committed.json", "shards/train/corpus/00002.arrow"):
        (tmp_path / "out" / lost).unlink()
    change_digit(tmp_path / "out" / name, after)
    build_set(path, unit_bytes=8000)
    assert read_tree(tmp_path / "out") == expected


@pytest.mark.parametrize("how", ["digit", "swap", "foreign", "cut"])
@pytest.mark.parametrize("phase", ["hashes", "merged"])
def test_hashes_of_an_earlier_run_are_not_believed(
    tmp_path: Path, texts: list[str], write_jsonl: Write, build_set: Build, read_tree: ReadTree,
    monkeypatch: pytest.MonkeyPatch, how: str, phase: str,
) -> None:  # fmt: skip
    """Whatever becomes of the files in journal/dedup, the same documents are duplicates."""
    path = write_jsonl([*texts, *texts[::3]])
    options = {"unit_bytes": 8000, "dedup": "exact"}
    monkeypatch.setattr(dedup, "PARTITION_TEXTS", 64)
    build_set(path, **options)
    expected = read_tree(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "encode_unit", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_set(path, output="killed", **options)
    folder = tmp_path / "killed" / "journal" / "dedup"
    first, second = sorted(folder.glob("*.hashes" if phase == "hashes" else "merged-*"))[:2]
    content = bytearray(first.read_bytes())
    if how == "digit":
        content[-1] ^= 1
        first.write_bytes(content)
    elif how == "cut":
        first.write_bytes(content[:-8])
    elif how == "swap":
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)
    else:
        (folder / "merged-0-of-1").write_bytes(bytes(16) + np.arange(99, dtype=np.uint64).tobytes())
    build_set(path, output="killed", **options)
    assert read_tree(tmp_path / "killed") == expected


def interrupt(*_: object) -> None:
    """The user stops the build here."""
    raise KeyboardInterrupt


@pytest.mark.parametrize("are_units_done", [False, True])
def test_a_trained_tokenizer_that_was_edited_is_trained_again(
    tmp_path: Path, texts: list[str], write_jsonl: Write, build_set: Build, read_tree: ReadTree,
    monkeypatch: pytest.MonkeyPatch, are_units_done: bool,
) -> None:  # fmt: skip
    """It decides every token, and is bound to the journal like the shards."""
    path = write_jsonl(texts)
    options = {"unit_bytes": 8000, "tokenizer": "train:300"}
    build_set(path, **options)
    expected = read_tree(tmp_path / "out")
    if not are_units_done:
        with monkeypatch.context() as patch:
            patch.setattr(build_module, "encode_unit", interrupt)
            with pytest.raises(KeyboardInterrupt):
                build_set(path, output="killed", **options)
    output = tmp_path / ("out" if are_units_done else "killed")
    layout = json.loads((output / "tokenizer.json").read_bytes())
    layout["model"]["merges"].reverse()
    (output / "tokenizer.json").write_text(json.dumps(layout))
    build_set(path, output=output.name, **options)
    assert read_tree(output) == expected


@pytest.mark.parametrize("noted", [True, False])
def test_a_trained_tokenizer_is_kept(
    tmp_path: Path, texts: list[str], write_jsonl: Write, build_set: Build,
    monkeypatch: pytest.MonkeyPatch, noted: bool,
) -> None:  # fmt: skip
    """Nothing is trained twice, also where an earlier version left no note of it."""
    path = write_jsonl(texts)
    build_set(path, tokenizer="train:300")
    if not noted:
        (tmp_path / "out" / "journal" / "trained.json").unlink()
    monkeypatch.setattr(prepare, "train_watched", None)
    build_set(path, tokenizer="train:300")
