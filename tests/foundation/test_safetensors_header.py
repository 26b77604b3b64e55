"""The header of a safetensors file: its bytes are fixed, and the library reads what follows it."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from foundation.safetensors_header import TensorSpec, safetensors_header


def test_the_bytes_are_those_of_every_earlier_version() -> None:
    """Checksums of checkpoints and exports are of these bytes; worked by hand."""
    header = safetensors_header(
        {
            "a": TensorSpec(torch.float32, (2, 3)),
            "b": TensorSpec(torch.bfloat16, ()),
            "ü": TensorSpec(torch.float16, (0, 5)),
        },
        {"format": "pt"},
    )
    text = (
        b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},'
        b'"b":{"dtype":"BF16","shape":[],"data_offsets":[24,26]},'
        b'"\\u00fc":{"dtype":"F16","shape":[0,5],"data_offsets":[26,26]}}'
    )
    padded = text + b" " * (-len(text) % 8)
    assert header.content == len(padded).to_bytes(8, "little") + padded
    first = 8 + len(padded)
    assert header.offsets == {"a": first, "b": first + 24, "ü": first + 26}
    assert header.file_bytes == first + 26


def test_the_library_reads_what_is_put_at_the_offsets(tmp_path: Path) -> None:
    """Tensors written in any order, each at its offset, come back under their names."""
    tensors = {
        "first": torch.randn(3, 4),
        "second/ünd": torch.randn(5).to(torch.bfloat16),
        "third": torch.randn(2, 1, 2).to(torch.float16),
    }
    header = safetensors_header(
        {name: TensorSpec(tensor.dtype, tensor.shape) for name, tensor in tensors.items()},
        {"key": 'a "value"'},
    )
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(header.content)
        file.truncate(header.file_bytes)
        for name, tensor in reversed(tensors.items()):
            file.seek(header.offsets[name])
            file.write(tensor.flatten().view(torch.uint8).numpy().tobytes())
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata() == {"key": 'a "value"'}
