"""The header of a safetensors file: which tensors the file holds, of what type, and where.

    8 bytes     length of what follows, little-endian
    JSON        {"__metadata__": {...}, name: {"dtype", "shape", "data_offsets": [begin, end]}, ...}
    spaces      up to a multiple of 8 bytes
    bytes       of the tensors, one behind the other in the order of the header

It follows from names, types and shapes alone, so a file can be begun before its tensors are there.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ALIGNMENT = 8


class TensorSpec(NamedTuple):
    """What a header says of a tensor, but for its position."""

    dtype: torch.dtype
    shape: Sequence[int]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class Header(NamedTuple):
    """The beginning of a safetensors file.

    Attributes:
        content: its bytes; the first tensor follows them.
        offsets: byte of the file at which each tensor begins.
        file_bytes: size of the whole file.
    """

    content: bytes
    offsets: dict[str, int]
    file_bytes: int


def safetensors_header(
    tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None
) -> Header:
    """The header of a file that holds these tensors in this order, with text beside them."""
    fields: dict[str, object] = {"__metadata__": dict(metadata or {})}
    begins: dict[str, int] = {}
    end = 0
    for name, tensor in tensors.items():
        begins[name], end = end, end + tensor.nbytes
        fields[name] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begins[name], end],
        }
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    content = len(text).to_bytes(8, "little") + text
    offsets = {name: len(content) + begin for name, begin in begins.items()}
    return Header(content, offsets, len(content) + end)
