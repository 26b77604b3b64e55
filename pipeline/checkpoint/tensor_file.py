"""A safetensors file written piece by piece, with its checksum, and read back from the disk.

The library's own writer would give no checksum, which would then be of what the disk returned
instead of what was meant; here both are compared. Memory beside the tensors: one block, or for
tensors on a GPU a copy of one of them.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from io import BufferedWriter
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from pipeline.checkpoint.files import BLOCK_BYTES, FileEntry, nothing, read_entry

_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ALIGNMENT = 8


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    reached: Callable[[str], None] = nothing,
) -> FileEntry:
    """Write tensors through to the disk and see that the disk has them.

    Args:
        path: the file; its folder exists.
        tensors: contiguous, by name.
        metadata: text beside them.
        reached: told of `weights-half-written`, `weights-before-sync` and `weights-before-check`.

    Raises:
        OSError: it cannot be written, or reads back as something else.
    """
    header = _header(tensors, metadata)
    total = len(header) + sum(tensor.nbytes for tensor in tensors.values())
    digest, written = xxhash.xxh3_128(header), len(header)
    with path.open("wb") as file:
        file.write(header)
        half = False
        for block in _blocks(tensors):
            file.write(block)
            digest.update(block)
            written += len(block)
            if not half and 2 * written >= total:
                half = True
                file.flush()
                reached("weights-half-written")
        file.flush()
        reached("weights-before-sync")
        _sync(file)
    entry = FileEntry(total, digest.hexdigest())
    reached("weights-before-check")
    if read_entry(path) != entry:
        raise OSError(f"{path.name} reads back from the disk as something else than was written")
    return entry


def _sync(file: BufferedWriter) -> None:
    """Bring a file to the disk, and forget what this machine remembers of it."""
    os.fsync(file.fileno())
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON: type, shape and place of each tensor, padded to whole words."""
    fields: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in tensors.items():
        fields[name] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _blocks(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    for tensor in tensors.values():
        assert tensor.is_contiguous(), "a strided view would be written in another order"
        raw = memoryview(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)
        for start in range(0, len(raw), BLOCK_BYTES):
            yield raw[start : start + BLOCK_BYTES]
