"""Reads tensors spread over safetensors files, found as Hugging Face's libraries find them."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from foundation.bounded_files import check_regular, is_name_inside
from foundation.json_text import read_json
from foundation.shown_text import reason
from model.errors import CheckpointError

MODEL_NAME = "model.safetensors"
MODEL_INDEX_NAME = "model.safetensors.index.json"


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
                self._file_of = read_weight_map(index)
            except (OSError, ValueError) as error:
                raise CheckpointError(
                    f"{index} cannot be read ({reason(error)}); export again"
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
            return open_tensors(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({reason(error)}); export again"
            ) from error


def read_weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, by an index.

    Raises:
        OSError: the index cannot be read.
        ValueError: it is no index, or names a file that does not lie beside it.
    """
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise ValueError("it has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or "/" in name or not is_name_inside(name):
            raise ValueError("it names a file that does not lie beside it")
    return weight_map


def open_tensors(path: Path) -> Any:
    """A safetensors file, opened; of a link to one, as in a cache of the Hugging Face hub, that.

    Raises:
        OSError: it is not there, or no file.
        SafetensorError: it is no safetensors file, or not whole.
    """
    check_regular(path)
    return safe_open(path, framework="pt")
