"""Folders that Hugging Face `datasets` wrote with save_to_disk, recognized by their own files."""

import json
from pathlib import Path
from typing import Any

from data_prep.errors import DataError, shown

STATE = "state.json"
INFO = "dataset_info.json"
SPLITS = "dataset_dict.json"


def files_of_saved_dataset(folder: Path) -> list[Path] | None:
    """The .arrow files of a saved Dataset or DatasetDict in their order; None for other folders.

    All splits of a DatasetDict are taken. Each is in a folder of its name; give that folder to take
    one split.

    Raises:
        DataError: The folder says that it is one, but a file is missing or cannot be read.
    """
    if (folder / SPLITS).is_file():
        splits = _load(folder / SPLITS).get("splits", [])
        found: list[Path] = []
        for split in splits:
            files = files_of_saved_dataset(folder / str(split))
            if files is None:
                raise DataError(
                    f"{folder / SPLITS} names the split {split!r}, but {folder / str(split)} holds "
                    f"no saved dataset; save it again"
                )
            found += files
        return found
    if not ((folder / STATE).is_file() and (folder / INFO).is_file()):
        return None
    try:
        entries = _load(folder / STATE)["_data_files"]
        files = [folder / str(entry["filename"]) for entry in entries]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{folder / STATE} is not what save_to_disk writes; save the dataset again"
        ) from error
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise DataError(f"{folder / STATE} names {missing[0]}, which is missing; save it again")
    return files


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {shown(path)} ({error}); save the dataset again") from error
    if not isinstance(content, dict):
        raise DataError(f"{shown(path)} is not what save_to_disk writes; save the dataset again")
    return content
