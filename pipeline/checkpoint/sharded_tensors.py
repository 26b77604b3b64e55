"""Weights and optimizer states on disk: one safetensors file per rank, readable in any layout.

Each rank writes the flat runs of elements that it owns, in fp32: of every parameter it has a part
of, the weight (the master weight of a bf16 run) and both Adam moments. A run is named after its
parameter and where it starts in the flattened slice of its tensor-parallel rank:

    rank_00003.safetensors    metadata: tensor_rank, tensor_size, adam_step
      weight/heads.readout.weight@4096      elements 4096 ... of this tensor-parallel slice
      exp_avg/heads.readout.weight@4096
      exp_avg_sq/heads.readout.weight@4096

A reader asks for elements of a parameter's slice in its own layout. Only what overlaps them is
read, so any data-parallel size, tensor-parallel size, ZeRO level and plan of stages can take over
from any other, every rank reading its own share.

Nothing here is pickled: files hold numbers and strings only.
"""

import bisect
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from foundation.bounded_files import check_regular
from foundation.durable_files import FileEntry
from foundation.shown_text import printable, reason
from model.config import ModelConfig
from model.errors import CheckpointError
from model.structure.parameter_shapes import checked_parameters, parameter_shapes
from model.structure.sharding import (
    Placement,
    local_shape,
    merge_slices,
    placement_of,
    stored_rows,
    whole_rows,
)
from pipeline.checkpoint.coverage import Extent, coverage_problems
from pipeline.checkpoint.tensor_file import write_tensors

_PATTERN = "rank_*.safetensors"
_FLOATS = ("F32", "BF16")  # bf16: of a bf16 run, frozen weights without a master weight


class Snapshot(NamedTuple):
    """What one rank writes.

    Attributes:
        rank: this rank's number, which names the file.
        tensor_rank: its tensor-parallel rank.
        tensor_size: how many of those there are.
        adam_step: optimizer steps taken, which Adam's bias correction counts.
        runs: flat fp32 tensors by `run_key`.
    """

    rank: int
    tensor_rank: int
    tensor_size: int
    adam_step: int
    runs: dict[str, Tensor]

    @property
    def file_name(self) -> str:
        """The rank's file in a checkpoint."""
        return f"rank_{self.rank:05d}.safetensors"

    def extents(self) -> list[Extent]:
        """Which elements the runs are."""
        extents = []
        for key, run in self.runs.items():
            kind, name, start = parse_run_key(key)
            # What is not split is saved by tensor-parallel rank 0 alone.
            extents.append(Extent(kind, name, self.tensor_rank, start, start + run.numel()))
        return extents

    def write(self, directory: Path) -> FileEntry:
        """Write the rank's file through to the disk.

        Args:
            directory: of the checkpoint's tensors.

        Returns:
            What the file is.

        Raises:
            OSError: the file cannot be written.
        """
        directory.mkdir(parents=True, exist_ok=True)
        metadata = {
            "tensor_rank": str(self.tensor_rank),
            "tensor_size": str(self.tensor_size),
            "adam_step": str(self.adam_step),
        }
        runs = {key: run.detach().contiguous() for key, run in self.runs.items()}
        return write_tensors(directory / self.file_name, runs, metadata)


def run_key(kind: str, name: str, start: int) -> str:
    """How a run of elements is called in a file."""
    return f"{kind}/{name}@{start}"


def parse_run_key(key: str) -> tuple[str, str, int]:
    """Kind, parameter and first element of the run that is called so.

    Raises:
        ValueError: no run is called so.
    """
    kind, _, rest = key.partition("/")
    name, _, start = rest.rpartition("@")
    return kind, name, int(start)


class _Run(NamedTuple):
    """A run of elements [start, stop) of a flattened tensor-parallel slice, and where it lies."""

    start: int
    stop: int
    path: Path
    key: str


class StateFiles:
    """The files that all ranks wrote for one checkpoint, read piece by piece.

    Args:
        directory: where they lie.
        config: sizes of the model they are of.

    Attributes:
        adam_step: optimizer steps taken.
        tensor_size: tensor-parallel size they were written with.

    Raises:
        CheckpointError: there are none, or one cannot be read.
    """

    def __init__(self, directory: Path, config: ModelConfig) -> None:
        self._directory = directory
        self._shapes = parameter_shapes(config)
        self._tensor_sizes = config.tensor_parallel_sizes
        self._runs: dict[tuple[str, str, int], list[_Run]] = defaultdict(list)
        self._open: tuple[Path, Any] | None = None
        if not (paths := sorted(directory.glob(_PATTERN))):
            raise CheckpointError(
                f"{directory} has no {_PATTERN}; use a complete checkpoint, written by this version"
            )
        self.tensor_size, self.adam_step = 0, 0  # until the first file says it
        for path in paths:
            self._index(path)
        for (kind, name, _), runs in self._runs.items():
            runs.sort()
            self._check_size(kind, name, max(run.stop for run in runs))

    def extents(self) -> Iterator[Extent]:
        """Which elements the files hold."""
        for (kind, name, rank), runs in self._runs.items():
            yield from (Extent(kind, name, rank, run.start, run.stop) for run in runs)

    def names(self) -> list[str]:
        """Parameters that the files hold, in the model's order; others last."""
        held = {name for kind, name, _ in self._runs if kind == "weight"}
        return [name for name in self._shapes if name in held] + sorted(held - set(self._shapes))

    def whole(self, kind: str, name: str) -> Tensor:
        """A parameter's whole weight or moment, `kind` being one of `coverage.KINDS`."""
        placement, shape = self._placed(name)
        size = 1 if placement.dim is None else self.tensor_size
        slices = []
        for rank in range(size):
            local = local_shape(shape, placement, size)
            slices.append(self._elements(kind, name, rank, 0, math.prod(local)).view(local))
        return merge_slices(slices, placement)

    def rows(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a matrix's whole weight or moment, without reading the others."""
        _, shape = self._placed(name)
        return self._rows(kind, name, range(start, stop), 0, shape[1])

    def part(
        self, kind: str, name: str, *, tensor_rank: int, tensor_size: int, start: int, stop: int
    ) -> Tensor:
        """Elements [start, stop) of the flattened slice that a tensor-parallel rank holds.

        Args:
            kind: one of `coverage.KINDS`.
            name: of the parameter.
            tensor_rank: of the reader.
            tensor_size: of the reader's layout.
            start: first element.
            stop: end of the elements.

        Returns:
            A flat fp32 tensor of `stop - start` elements.

        Raises:
            CheckpointError: the files do not hold all of them.
        """
        placement, shape = self._placed(name)
        if placement.dim is None:
            return self._elements(kind, name, 0, start, stop)
        if tensor_size == self.tensor_size:
            return self._elements(kind, name, tensor_rank, start, stop)
        columns = local_shape(shape, placement, tensor_size)[1]
        first, last = start // columns, -(-stop // columns)
        rows = torch.cat(
            [
                self._rows(kind, name, whole, tensor_rank * columns, columns)
                for whole in whole_rows(
                    range(first, last), shape, placement, tensor_rank, tensor_size
                )
            ]
            if placement.dim == 0
            else [self._rows(kind, name, range(first, last), tensor_rank * columns, columns)]
        )
        return rows.flatten()[start - first * columns : stop - first * columns]

    def _rows(self, kind: str, name: str, rows: range, column: int, columns: int) -> Tensor:
        """Rows of the whole matrix: those of split rows whole, of split columns a window of them.

        Returns:
            `[len(rows), columns]`.
        """
        placement, shape = self._placed(name)
        size = self.tensor_size
        local = local_shape(shape, placement, size)
        if placement.dim == 1:
            window = []
            for rank in range(column // local[1], (column + columns - 1) // local[1] + 1):
                stored = self._elements(
                    kind, name, rank, rows.start * local[1], rows.stop * local[1]
                ).view(-1, local[1])
                low = max(column - rank * local[1], 0)
                high = min(column + columns - rank * local[1], local[1])
                window.append(stored[:, low:high])
            return torch.cat(window, dim=1)
        width = shape[1]
        pieces = []
        for rank, span in stored_rows(rows, shape, placement, size):
            pieces.append(
                self._elements(kind, name, rank, span.start * width, span.stop * width).view(
                    -1, width
                )
            )
        return torch.cat(pieces)

    def _elements(self, kind: str, name: str, rank: int, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of what tensor-parallel rank `rank` held, flat."""
        out = torch.empty(stop - start, dtype=torch.float32)
        runs = self._runs.get((kind, name, rank), [])
        done = start
        for run in runs[max(bisect.bisect_right(runs, start, key=lambda r: r.start) - 1, 0) :]:
            if run.start > done or done >= stop:
                break
            end = min(run.stop, stop)
            if end > done:
                stored = self._file(run.path).get_slice(run.key)
                out[done - start : end - start] = stored[done - run.start : end - run.start]
                done = end
        if done < stop:
            raise CheckpointError(
                f"{self._directory} holds {kind} of parameter {name} (tensor-parallel rank {rank}) "
                f"only up to element {done:,} of {stop:,}; use a complete checkpoint of this model"
            )
        return out

    def _placed(self, name: str) -> tuple[Placement, tuple[int, ...]]:
        shape = self._shapes.get(name)
        if shape is None:
            raise CheckpointError(
                f"{self._directory}: parameter {printable(name)} is not one of this model's; use a "
                "checkpoint of this model"
            )
        return placement_of(name), shape

    def _check_size(self, kind: str, name: str, stored: int) -> None:
        """Refuse more elements than the parameter has: they would be another model's."""
        if name not in self._shapes:
            return  # an error when it is read
        placement, shape = self._placed(name)
        expected = math.prod(local_shape(shape, placement, self.tensor_size))
        if stored > expected:
            raise CheckpointError(
                f"{self._directory} holds {stored:,} elements of the {kind} of parameter {name}, "
                f"the model's sizes give {expected:,}; use a checkpoint of this model"
            )

    def _index(self, path: Path) -> None:
        try:
            file = self._file(path)
            metadata: Mapping[str, str] = file.metadata() or {}
            rank, size = int(metadata["tensor_rank"]), int(metadata["tensor_size"])
            if size not in self._tensor_sizes or self.tensor_size not in (0, size):
                raise ValueError(f"tensor_size={size}")
            self.tensor_size = size
            self.adam_step = max(self.adam_step, int(metadata["adam_step"]))
            for key in file.keys():  # noqa: SIM118 - not a mapping
                kind, name, first = parse_run_key(key)
                run = file.get_slice(key)
                if run.get_dtype() not in _FLOATS or len(run.get_shape()) != 1 or first < 0:
                    raise ValueError("a run that is not flat, or not of floats")
                stop = first + run.get_shape()[0]
                self._runs[kind, name, rank].append(_Run(first, stop, path, key))
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"{path} is not a file of this project's checkpoints ({reason(error)}); use "
                "another checkpoint"
            ) from error

    def _file(self, path: Path) -> Any:
        """The file, opened; the last one stays open."""
        if self._open is None or self._open[0] != path:
            try:
                check_regular(path)
                opened = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"{path} cannot be read ({reason(error)}); use another checkpoint"
                ) from error
            self._open = (path, opened)
        return self._open[1]


def missing_state(
    directory: Path, config: ModelConfig, *, trained: Callable[[str], bool]
) -> list[str]:
    """What the files of a checkpoint lack of the model, or hold twice; a line each.

    Args:
        directory: where the ranks put their files.
        config: the model's sizes.
        trained: whether the optimizer has the parameter of a name.

    Raises:
        OSError: a file cannot be read.
    """
    try:
        files = StateFiles(directory, config)
    except CheckpointError as error:
        raise OSError(str(error)) from error
    return coverage_problems(
        files.extents(), config, tensor_size=files.tensor_size, trained=trained
    )


def read_weights(directory: Path, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the model, whole and in fp32, one at a time.

    Args:
        directory: where the ranks of one checkpoint put their files.
        config: the model's sizes.

    Raises:
        CheckpointError: a file is missing or unreadable, or the parameters are not this model's.
    """
    return weights_in(StateFiles(directory, config), config, directory)


def weights_in(
    files: StateFiles, config: ModelConfig, directory: Path
) -> Iterator[tuple[str, Tensor]]:
    """The same of files that are open."""
    weights = ((name, files.whole("weight", name)) for name in files.names())
    return checked_parameters(weights, config, directory)
