"""A safetensors file written piece by piece, with its checksum, and read back from the disk.

The library's own writer would give no checksum, which would then be of what the disk returned
instead of what was meant; here both are compared. Memory beside the tensors: one block, or for
tensors on a GPU a copy of one of them.
"""

import os
from collections.abc import Iterator, Mapping
from io import BufferedWriter
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from foundation.durable_files import BLOCK_BYTES, FileEntry, read_entry
from foundation.safetensors_header import TensorSpec, safetensors_header
from pipeline.checkpoint.crash_points import crash_point


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> FileEntry:
    """Write tensors through to the disk and see that the disk has them.

    Args:
        path: the file; its folder exists.
        tensors: contiguous, by name.
        metadata: text beside them.

    Raises:
        OSError: it cannot be written, or reads back as something else.
    """
    specs = {name: TensorSpec(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    header, _, total = safetensors_header(specs, metadata)
    digest = xxhash.xxh3_128(header)
    with path.open("wb") as file:
        file.write(header)
        for block in _blocks(tensors):
            file.write(block)
            digest.update(block)
        file.flush()
        crash_point("weights-half-written", halve=path)
        crash_point("weights-before-sync")
        _sync(file)
    entry = FileEntry(total, digest.hexdigest())
    crash_point("weights-before-check")
    if read_entry(path) != entry:
        raise OSError(f"{path.name} reads back from the disk as something else than was written")
    return entry


def _sync(file: BufferedWriter) -> None:
    """Bring a file to the disk, and forget what this machine remembers of it."""
    os.fsync(file.fileno())
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _blocks(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    for tensor in tensors.values():
        assert tensor.is_contiguous(), "a strided view would be written in another order"
        raw = memoryview(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)
        for start in range(0, len(raw), BLOCK_BYTES):
            yield raw[start : start + BLOCK_BYTES]
