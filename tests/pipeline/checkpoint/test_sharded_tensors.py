"""Files of weights and moments: any slice of any layout out of the runs of any other."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from model.config import ModelConfig
from model.errors import CheckpointError
from model.structure.parameter_shapes import parameter_shapes
from model.structure.sharding import placement_of, take_slice
from pipeline.checkpoint.coverage import KINDS
from pipeline.checkpoint.sharded_tensors import Snapshot, StateFiles, read_weights, run_key
from tests.support.hostile import check_message

MODEL = ModelConfig(
    layers=3,
    hidden_size=24,
    attention_heads=4,
    kv_heads=4,
    ffn_hidden_size=40,
    vocab_size=52,
    future_tokens=2,
)


def _values() -> dict[tuple[str, str], Tensor]:
    """Every weight and moment, whole; each element tells which it is."""
    generator = torch.Generator().manual_seed(0)
    return {
        (kind, name): torch.randn(shape, generator=generator)
        for name, shape in parameter_shapes(MODEL).items()
        for kind in KINDS
    }


VALUES = _values()


def _write(directory: Path, tensor_size: int, cuts: int) -> None:
    """As `tensor_size` x `cuts` ranks would: each run a share of a flattened slice."""
    for tensor_rank in range(tensor_size):
        for part in range(cuts):
            runs = {}
            for (kind, name), value in VALUES.items():
                placement = placement_of(name)
                if placement.dim is None and tensor_rank:
                    continue
                flat = take_slice(value, placement, tensor_rank, tensor_size).flatten()
                start, stop = (flat.numel() * p // cuts for p in (part, part + 1))
                runs[run_key(kind, name, start)] = flat[start:stop]
            rank = tensor_rank * cuts + part
            Snapshot(rank, tensor_rank, tensor_size, 7, runs).write(directory)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Path]:
    """The same values, written in several layouts."""
    layouts = [(tensor, cuts) for tensor in (1, 2, 4) for cuts in (1, 3)]
    folders = {layout: tmp_path_factory.mktemp("files") for layout in layouts}
    for (tensor_size, cuts), folder in folders.items():
        _write(folder, tensor_size, cuts)
    return folders


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_rows_are_found(folders: dict[tuple[int, int], Path], data: st.DataObject) -> None:
    """Rows of a whole matrix, from files of any layout."""
    folder = folders[data.draw(st.sampled_from(sorted(folders)))]
    kind, name = data.draw(st.sampled_from([key for key in VALUES if VALUES[key].dim() == 2]))
    whole = VALUES[kind, name]
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = data.draw(st.integers(start + 1, len(whole)))
    rows = StateFiles(folder, MODEL).rows(kind, name, start, stop)
    assert torch.equal(rows, whole[start:stop])


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_part_of_any_slice_is_found(
    folders: dict[tuple[int, int], Path], data: st.DataObject
) -> None:
    """Elements of a tensor-parallel slice of 1, 2 or 4, from files of 1, 2 or 4 in 1 or 3 cuts."""
    files = StateFiles(folders[data.draw(st.sampled_from(sorted(folders)))], MODEL)
    kind, name = data.draw(st.sampled_from(sorted(VALUES)))
    tensor_size = data.draw(st.sampled_from([1, 2, 4]))
    tensor_rank = data.draw(st.integers(0, tensor_size - 1))
    wanted = take_slice(VALUES[kind, name], placement_of(name), tensor_rank, tensor_size).flatten()
    start = data.draw(st.integers(0, wanted.numel() - 1))
    stop = data.draw(st.integers(start + 1, wanted.numel()))
    part = files.part(
        kind, name, tensor_rank=tensor_rank, tensor_size=tensor_size, start=start, stop=stop
    )
    assert torch.equal(part, wanted[start:stop])


def test_whole_weights_come_back(folders: dict[tuple[int, int], Path]) -> None:
    """Reading everything gives every parameter of the model, bit by bit, from every layout."""
    for folder in folders.values():
        weights = dict(read_weights(folder, MODEL))
        assert list(weights) == list(parameter_shapes(MODEL))
        for name, weight in weights.items():
            assert torch.equal(weight, VALUES["weight", name]), name
        assert StateFiles(folder, MODEL).adam_step == 7


def test_missing_runs_are_named(tmp_path: Path) -> None:
    """A rank's file that is not there: the first element nobody wrote is named."""
    _write(tmp_path, 1, 3)
    (tmp_path / "rank_00001.safetensors").unlink()
    count = math.prod(parameter_shapes(MODEL)["heads.readout.weight"])
    with pytest.raises(CheckpointError, match=f"only up to element {count // 3:,} of {count:,}"):
        StateFiles(tmp_path, MODEL).whole("weight", "heads.readout.weight")


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    """No file, a torn file and a file of something else each have their message."""
    with pytest.raises(CheckpointError, match=r"has no rank_\*\.safetensors"):
        StateFiles(tmp_path, MODEL)
    torn = tmp_path / "rank_00000.safetensors"
    torn.write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        StateFiles(tmp_path, MODEL)
    Snapshot(0, 0, 1, 0, {"weight": torch.zeros(2)}).write(tmp_path)
    with pytest.raises(CheckpointError, match="is not a file of this project's checkpoints"):
        StateFiles(tmp_path, MODEL)


def test_files_of_a_larger_model_are_refused(folders: dict[tuple[int, int], Path]) -> None:
    """More elements than the model's sizes give are not cut off silently."""
    smaller = MODEL.model_copy(update={"vocab_size": 48})
    with pytest.raises(CheckpointError, match=r"holds 1,248 elements .* give 1,152"):
        StateFiles(folders[1, 3], smaller)


@pytest.mark.parametrize(
    ("metadata", "runs"),
    [
        ({"tensor_size": "0"}, {}),
        ({"tensor_size": "-1"}, {}),
        ({"tensor_size": "3"}, {}),
        ({"tensor_size": "9" * 5000}, {}),
        ({"adam_step": "x"}, {}),
        ({}, {"weight/heads.readout.weight@-5": torch.zeros(5)}),
        ({}, {"weight/heads.readout.weight@0": torch.zeros(2, 2)}),
        ({}, {"weight/heads.readout.weight@0": torch.tensor(1.0)}),
        ({}, {"weight/heads.readout.weight@0": torch.zeros(5, dtype=torch.int64)}),
        ({}, {"weight/heads.readout.weight@" + "9" * 5000: torch.zeros(5)}),
    ],
)
def test_files_that_no_save_writes_are_refused(
    tmp_path: Path, metadata: dict[str, str], runs: dict[str, Tensor]
) -> None:
    """Layouts that the model has not, runs that are not flat, and numbers that are none."""
    facts = {"tensor_rank": "0", "tensor_size": "1", "adam_step": "1"} | metadata
    save_file(runs, tmp_path / "rank_00000.safetensors", facts)
    with pytest.raises(CheckpointError, match="is not a file of this project") as caught:
        StateFiles(tmp_path, MODEL)
    check_message(str(caught.value))
