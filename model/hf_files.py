"""Tensors spread over safetensors files, as Hugging Face's libraries look for them."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.errors import CheckpointError
from model.hf_names import EXTRA_HEADS

MODEL_NAME = "model.safetensors"
MODEL_INDEX_NAME = "model.safetensors.index.json"
ALL_HEADS_INDEX_NAME = "all_heads.safetensors.index.json"


class WeightFiles:
    """Files of a Llama's tensors, and files of the extra heads'.

    With extra heads there are two indexes. `model.safetensors.index.json` leaves them out, also
    where the model is one file: loaders that would read every safetensors file of a folder keep to
    that index. `all_heads.safetensors.index.json` has all tensors.

    Args:
        folder: where to.
        max_file_bytes: a new file is begun when a tensor would make one larger than this; no more
            than one file of each kind is held in memory.
    """

    def __init__(self, folder: Path, max_file_bytes: int) -> None:
        self._folder = folder
        self._model = _Files(folder, "model", max_file_bytes)
        self._extra_heads = _Files(folder, EXTRA_HEADS, max_file_bytes)

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one more tensor; writes what is held when the tensor does not fit in with it."""
        files = self._extra_heads if name.startswith(f"{EXTRA_HEADS}.") else self._model
        files.add(name, tensor)

    def close(self) -> None:
        """Write the rest, give the files their names, and write the indexes."""
        model, extra_heads = self._model.close(), self._extra_heads.close()
        if extra_heads or len(set(model.values())) > 1:
            self._write_index(MODEL_INDEX_NAME, model, self._model.total_bytes)
        if extra_heads:
            total_bytes = self._model.total_bytes + self._extra_heads.total_bytes
            self._write_index(ALL_HEADS_INDEX_NAME, model | extra_heads, total_bytes)

    def _write_index(self, name: str, places: dict[str, str], total_bytes: int) -> None:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": places}
        (self._folder / name).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


class _Files:
    """STEM.safetensors, or STEM-00001-of-0000N.safetensors and so on."""

    def __init__(self, folder: Path, stem: str, max_file_bytes: int) -> None:
        self.total_bytes = 0
        self._folder = folder
        self._stem = stem
        self._max_file_bytes = max_file_bytes
        self._tensors: dict[str, Tensor] = {}
        self._bytes = 0
        self._written: list[tuple[Path, list[str]]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one more tensor."""
        if self._tensors and self._bytes + tensor.nbytes > self._max_file_bytes:
            self._flush()
        self._tensors[name] = tensor
        self._bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def close(self) -> dict[str, str]:
        """Write the rest; gives each tensor's file."""
        if self._tensors:
            self._flush()
        count = len(self._written)
        places: dict[str, str] = {}
        for number, (path, names) in enumerate(self._written, 1):
            part = "" if count == 1 else f"-{number:05d}-of-{count:05d}"
            final = f"{self._stem}{part}.safetensors"
            path.rename(self._folder / final)
            places |= dict.fromkeys(names, final)
        return places

    def _flush(self) -> None:
        path = self._folder / f"{self._stem}.part-{len(self._written) + 1}"
        try:
            save_file(self._tensors, path, metadata={"format": "pt"})
        except SafetensorError as error:  # an I/O error in this library's own clothes
            raise OSError(str(error)) from error
        self._written.append((path, list(self._tensors)))
        self._tensors, self._bytes = {}, 0


class StoredTensors:
    """The tensors that an index lists, read one at a time.

    Args:
        folder: where the files are.
        index_name: the index; where the folder has none of that name (one file, no extra heads),
            the tensors are those of model.safetensors.

    Raises:
        CheckpointError: the index or a file cannot be read.
    """

    def __init__(self, folder: Path, index_name: str) -> None:
        self._folder = folder
        index = folder / index_name
        if index.is_file():
            try:
                self._places: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
            except (OSError, ValueError, LookupError, TypeError) as error:
                raise CheckpointError(
                    f"{index} cannot be read ({type(error).__name__}: {error}); export again"
                ) from error
        else:
            self._places = dict.fromkeys(self._open(MODEL_NAME).keys(), MODEL_NAME)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor that the listed files hold, without those in a wrong file."""
        found = {}
        for file_name in sorted(set(self._places.values())):
            file = self._open(file_name)
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if self._places.get(name, file_name) == file_name:
                    found[name] = tuple(file.get_slice(name).get_shape())
        return found

    def whole(self, name: str) -> Tensor:
        """One tensor, in the type it is stored in."""
        return self._open(self._place(name)).get_tensor(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a matrix, in the type it is stored in."""
        return self._open(self._place(name)).get_slice(name)[start:stop]

    def _place(self, name: str) -> str:
        if name not in self._places:
            raise CheckpointError(f"{self._folder}: tensor {name} is missing; export again")
        return self._places[name]

    def _open(self, file_name: str) -> Any:
        """The file, opened anew, so that what was read of it does not stay in memory."""
        path = self._folder / file_name
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); export again") from error
