"""Tensor files: what the safetensors library reads is what was written, and the disk has it."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from foundation.durable_files import BLOCK_BYTES, read_entry
from pipeline.checkpoint.tensor_file import write_tensors


@pytest.mark.parametrize("count", [0, 1, 7, BLOCK_BYTES // 4 + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_library_reads_it(tmp_path: Path, count: int, dtype: torch.dtype) -> None:
    """Every type, empty tensors, and more than one block: names, values and metadata come back."""
    path = tmp_path / "x.safetensors"
    tensors = {"a/b@0": torch.randn(count).to(dtype), "second": torch.arange(3.0).to(dtype)}
    entry = write_tensors(path, tensors, {"key": "value"})
    assert entry == read_entry(path)
    assert entry.size == path.stat().st_size
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"key": "value"}


def test_a_disk_that_changes_what_it_is_given_is_found(tmp_path: Path) -> None:
    """The file is read back: a byte that came out differently is an error before anyone counts."""
    path = tmp_path / "x.safetensors"

    def damage(point: str) -> None:
        if point == "weights-before-check":
            with path.open("r+b") as file:
                file.seek(-5, 2)
                file.write(b"\x7f")

    with pytest.raises(OSError, match=r"x\.safetensors reads back from the disk as something else"):
        write_tensors(path, {"a": torch.zeros(100)}, {}, damage)


def test_points_are_passed_in_order(tmp_path: Path) -> None:
    """Half-written comes when half of the bytes are there, and the others after all are."""
    path = tmp_path / "x.safetensors"
    sizes: dict[str, int] = {}
    tensors = {"a": torch.zeros(3 * BLOCK_BYTES // 4)}

    def note(point: str) -> None:
        sizes[point] = path.stat().st_size

    entry = write_tensors(path, tensors, {}, note)
    assert list(sizes) == ["weights-half-written", "weights-before-sync", "weights-before-check"]
    assert entry.size // 2 <= sizes["weights-half-written"] < entry.size
    assert sizes["weights-before-sync"] == entry.size
