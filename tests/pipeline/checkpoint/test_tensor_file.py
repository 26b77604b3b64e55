"""Tensor files: what the safetensors library reads is what was written, and the disk has it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from foundation.durable_files import BLOCK_BYTES, read_entry
from pipeline.checkpoint import tensor_file
from pipeline.checkpoint.crash_points import VARIABLE
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


ROOT = Path(__file__).parents[3]


def test_a_disk_that_changes_what_it_is_given_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is read back: a byte that came out differently is an error before anyone counts."""
    path = tmp_path / "x.safetensors"

    def damage(point: str, *, halve: Path | None = None) -> None:
        if point == "weights-before-check":
            with path.open("r+b") as file:
                file.seek(-5, 2)
                file.write(b"\x7f")

    monkeypatch.setattr(tensor_file, "crash_point", damage)
    with pytest.raises(OSError, match=r"x\.safetensors reads back from the disk as something else"):
        write_tensors(path, {"a": torch.zeros(100)}, {})


def test_killed_while_it_writes_it_leaves_half_of_the_file(tmp_path: Path) -> None:
    """The crash point of a torn write ends the process and leaves half of the bytes."""
    whole, torn = tmp_path / "whole.safetensors", tmp_path / "torn.safetensors"
    entry = write_tensors(whole, {"a": torch.zeros(1000)}, {})
    code = (
        "import sys, torch; from pathlib import Path; "
        "from pipeline.checkpoint.tensor_file import write_tensors; "
        "write_tensors(Path(sys.argv[1]), {'a': torch.zeros(1000)}, {})"
    )
    environment = os.environ | {VARIABLE: "weights-half-written"}
    command = [sys.executable, "-c", code, str(torn)]
    done = subprocess.run(command, env=environment, cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert torn.stat().st_size == entry.size // 2
    assert torn.read_bytes() == whole.read_bytes()[: entry.size // 2]
