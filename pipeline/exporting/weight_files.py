"""Tensors written to safetensors files, as Hugging Face's libraries look for them."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from foundation.safetensors_header import TensorSpec, safetensors_header
from model.hugging_face.folder import ALL_HEADS_INDEX_NAME
from model.hugging_face.names import EXTRA_HEADS, is_extra
from model.hugging_face.stored_tensors import MODEL_INDEX_NAME


class _Position(NamedTuple):
    """Where a tensor's bytes begin."""

    file_name: str
    offset: int


class WeightFiles:
    """Files of a Llama's tensors, and files of the extra heads', written tensor by tensor.

    What each file holds, and where, follows from names and shapes alone, so headers are written
    first and every tensor is written to its position when it comes: none is held.

    With extra heads there are two indexes. `model.safetensors.index.json` leaves them out, also
    where the model is one file: loaders that would read every safetensors file of a folder keep to
    that index. `all_heads.safetensors.index.json` has all tensors.

    Args:
        folder: where to.
        shapes: of all tensors, by name.
        dtype: of all tensors.
        max_file_bytes: a new file is begun with a tensor that would make one larger than this.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        max_file_bytes: int,
    ) -> None:
        self._folder = folder
        self._shapes = shapes
        self._dtype = dtype
        self._positions: dict[str, _Position] = {}
        self._model = [name for name in shapes if not is_extra(name)]
        self._extra_heads = [name for name in shapes if is_extra(name)]
        for stem, names in (("model", self._model), (EXTRA_HEADS, self._extra_heads)):
            files = list(self._files(names, max_file_bytes))
            for number, held in enumerate(files, 1):
                part = "" if len(files) == 1 else f"-{number:05d}-of-{len(files):05d}"
                self._begin(f"{stem}{part}.safetensors", held)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor."""
        assert (tuple(tensor.shape), tensor.dtype) == (self._shapes[name], self._dtype), name
        position = self._positions[name]
        content = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
        with (self._folder / position.file_name).open("r+b") as file:
            file.seek(position.offset)
            file.write(content.data)

    def close(self) -> None:
        """Write the indexes, all tensors being there."""
        model_files = {self._positions[name].file_name for name in self._model}
        if self._extra_heads or len(model_files) > 1:
            self._write_index(MODEL_INDEX_NAME, self._model)
        if self._extra_heads:
            self._write_index(ALL_HEADS_INDEX_NAME, self._model + self._extra_heads)

    def _files(self, names: Sequence[str], max_file_bytes: int) -> Iterator[list[str]]:
        """The names of each file's tensors."""
        held: list[str] = []
        held_bytes = 0
        for name in names:
            size = self._bytes(name)
            if held and held_bytes + size > max_file_bytes:
                yield held
                held, held_bytes = [], 0
            held.append(name)
            held_bytes += size
        if held:
            yield held

    def _begin(self, file_name: str, names: Sequence[str]) -> None:
        """Write a file's header, and make room for its tensors."""
        specs = {name: TensorSpec(self._dtype, self._shapes[name]) for name in names}
        header = safetensors_header(specs, {"format": "pt"})
        with (self._folder / file_name).open("wb") as file:
            file.write(header.content)
            file.truncate(header.file_bytes)
        self._positions |= {name: _Position(file_name, at) for name, at in header.offsets.items()}

    def _bytes(self, name: str) -> int:
        return math.prod(self._shapes[name]) * self._dtype.itemsize

    def _write_index(self, file_name: str, names: Sequence[str]) -> None:
        index = {
            "metadata": {"total_size": sum(self._bytes(name) for name in names)},
            "weight_map": {name: self._positions[name].file_name for name in names},
        }
        (self._folder / file_name).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
