"""Reads tensors spread over safetensors files, found as Hugging Face's libraries find them."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.errors import CheckpointError

MODEL_NAME = "model.safetensors"
MODEL_INDEX_NAME = "model.safetensors.index.json"
ALL_HEADS_INDEX_NAME = "all_heads.safetensors.index.json"


class StoredTensors:
    """The tensors that an index lists, read one at a time.

    Args:
        folder: where the files are.
        index_name: the index; where the folder has none of that name, the tensors are those of
            model.safetensors.index.json, and without that (one file) of model.safetensors.

    Raises:
        CheckpointError: the index or a file cannot be read.
    """

    def __init__(self, folder: Path, index_name: str) -> None:
        self._folder = folder
        indexes = [folder / name for name in (index_name, MODEL_INDEX_NAME)]
        index = next((path for path in indexes if path.is_file()), None)
        if index is not None:
            try:
                self._file_of: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
            except (OSError, ValueError, LookupError, TypeError) as error:
                raise CheckpointError(
                    f"{index} cannot be read ({type(error).__name__}: {error}); export again"
                ) from error
        else:
            self._file_of = dict.fromkeys(self._open(MODEL_NAME).keys(), MODEL_NAME)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor that the listed files hold, without those in a wrong file."""
        found = {}
        for file_name in sorted(set(self._file_of.values())):
            file = self._open(file_name)
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if self._file_of.get(name, file_name) == file_name:
                    found[name] = tuple(file.get_slice(name).get_shape())
        return found

    def whole(self, name: str) -> Tensor:
        """One tensor, in the type it is stored in."""
        return self._open(self._file(name)).get_tensor(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a matrix, in the type it is stored in."""
        return self._open(self._file(name)).get_slice(name)[start:stop]

    def _file(self, name: str) -> str:
        if name not in self._file_of:
            raise CheckpointError(f"{self._folder}: tensor {name} is missing; export again")
        return self._file_of[name]

    def _open(self, file_name: str) -> Any:
        """The file, opened again each time, so that what was read does not stay in memory."""
        path = self._folder / file_name
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); export again") from error
