"""Tensors spread over safetensors files, as Hugging Face's libraries look for them."""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from model.hf_names import EXTRA_HEADS

MODEL_NAME = "model.safetensors"
MODEL_INDEX_NAME = "model.safetensors.index.json"
EXTRA_HEADS_NAME = f"{EXTRA_HEADS}.safetensors"
ALL_HEADS_INDEX_NAME = "all_heads.safetensors.index.json"


class WeightFiles:
    """Files of a Llama's tensors, and one more of the extra heads'.

    With extra heads there are two indexes. `model.safetensors.index.json` leaves them out, also
    where the model is one file: loaders that would read every safetensors file of a folder keep to
    that index. `all_heads.safetensors.index.json` has all tensors.

    Args:
        folder: where to.
        max_file_bytes: a new file is begun when a tensor would make one larger than this.
    """

    def __init__(self, folder: Path, max_file_bytes: int) -> None:
        self._folder = folder
        self._max_file_bytes = max_file_bytes
        self._tensors: dict[str, Tensor] = {}
        self._bytes = 0
        self._written: list[tuple[Path, dict[str, int]]] = []
        self._extra_heads: dict[str, Tensor] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one more tensor; writes what is held when the tensor does not fit in with it."""
        if name.startswith(f"{EXTRA_HEADS}."):
            self._extra_heads[name] = tensor
            return
        if self._tensors and self._bytes + tensor.nbytes > self._max_file_bytes:
            self._flush()
        self._tensors[name] = tensor
        self._bytes += tensor.nbytes

    def close(self) -> None:
        """Write the rest, give the files their names, and write the indexes."""
        self._flush()
        count = len(self._written)
        places: dict[str, str] = {}
        sizes: dict[str, int] = {}
        for number, (path, tensors) in enumerate(self._written, 1):
            final = MODEL_NAME if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            path.rename(self._folder / final)
            places |= dict.fromkeys(tensors, final)
            sizes |= tensors
        if count > 1 or self._extra_heads:
            self._write_index(MODEL_INDEX_NAME, places, sizes)
        if self._extra_heads:
            _save(self._extra_heads, self._folder / EXTRA_HEADS_NAME)
            places |= dict.fromkeys(self._extra_heads, EXTRA_HEADS_NAME)
            sizes |= {name: tensor.nbytes for name, tensor in self._extra_heads.items()}
            self._write_index(ALL_HEADS_INDEX_NAME, places, sizes)

    def _write_index(self, name: str, places: dict[str, str], sizes: dict[str, int]) -> None:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (self._folder / name).write_text(json.dumps(index, indent=2) + "\n", "utf-8")

    def _flush(self) -> None:
        path = self._folder / f"part-{len(self._written) + 1}"
        _save(self._tensors, path)
        self._written.append((path, {name: t.nbytes for name, t in self._tensors.items()}))
        self._tensors, self._bytes = {}, 0


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # an I/O error in this library's own clothes
        raise OSError(str(error)) from error
