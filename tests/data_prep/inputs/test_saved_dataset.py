"""Folders of Hugging Face datasets as inputs."""

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from data_prep.errors import DataError
from data_prep.inputs.input_files import find_inputs

Read = Callable[..., list[tuple[int, str | None, str]]]

TEXTS = [f"row {number}" for number in range(30)]


def test_a_saved_dataset_is_read_in_its_order(tmp_path: Path, read_records: Read) -> None:
    """The shards that save_to_disk wrote are read in order, filtered and shuffled as saved."""
    saved = datasets.Dataset.from_dict({"text": TEXTS}).filter(lambda row: row["text"] != "row 3")
    saved.save_to_disk(str(tmp_path / "set"), num_shards=3)
    (tmp_path / "set" / "cache-1.arrow").write_bytes(b"left by map")
    expected = [text for text in TEXTS if text != "row 3"]
    assert [text for _, text, _ in read_records(tmp_path / "set")] == expected
    (tmp_path / "a.txt").write_text("beside")
    found = [text for _, text, _ in read_records(tmp_path)]
    assert found == ["beside", *expected]


def test_all_splits_of_a_dictionary_are_read(tmp_path: Path, read_records: Read) -> None:
    """A DatasetDict gives its splits one after the other; one of them can be named instead."""
    splits = {"train": TEXTS[:20], "test": TEXTS[20:]}
    dictionary = datasets.DatasetDict(
        {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in splits.items()}
    )
    dictionary.save_to_disk(str(tmp_path / "set"))
    assert [text for _, text, _ in read_records(tmp_path / "set")] == TEXTS
    assert [text for _, text, _ in read_records(tmp_path / "set" / "test")] == TEXTS[20:]


def test_incomplete_datasets_are_refused(tmp_path: Path) -> None:
    """A folder that names a missing file or split, or whose list is broken, is no input."""
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path / "set"))
    (file,) = (tmp_path / "set").glob("*.arrow")
    file.unlink()
    with pytest.raises(DataError, match=r"names .*arrow, which is missing"):
        find_inputs([tmp_path / "set"])
    (tmp_path / "set" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="not what save_to_disk writes"):
        find_inputs([tmp_path])
    (tmp_path / "set" / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    with pytest.raises(DataError, match="names the split 'train'"):
        find_inputs([tmp_path / "set"])
