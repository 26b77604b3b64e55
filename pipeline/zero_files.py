"""Whole fp32 weights out of DeepSpeed's checkpoint files of any layout, on one CPU process.

What lies where (t tensor-parallel, d data-parallel rank; bf16 runs put `bf16_` before `zero_pp`):

    ZeRO 0 fp32   mp_rank_{t}_model_states.pt    module: weights by name
    ZeRO 0 bf16   the same                       optimizer.fp32_groups: master weights in order
    ZeRO 1, 2     zero_pp_rank_{d}_mp_rank_{t}_optim_states.pt
                                                 one flat slice per optimizer group; the slices of
                                                 all d one after the other hold the whole group
    ZeRO 3        the same                       a padded share of each parameter, one after the
                                                 other

Names and shapes, per optimizer group, are `param_shapes` in the model states. What is frozen is in
no optimizer: ZeRO 0 to 2 have it whole under `module`, ZeRO 3 in shares under
`frozen_param_fragments`, all of them as the model computes with them. Files are mapped
into memory and read with `weights_only`; DeepSpeed itself is not needed.
"""

import math
import pickle
import re
from collections.abc import Collection, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.config import ModelConfig
from model.errors import CheckpointError
from model.freezing import is_trained
from model.parameter_shapes import checked_parameters
from model.sharding import merge_slices, placement_of

TAG = "zero"  # the subfolder that DeepSpeed makes


def stage_directory(directory: Path, stage: int, num_stages: int) -> Path:
    """Where a stage's engine puts its files: `directory` itself when there is only one."""
    return directory if num_stages == 1 else directory / f"stage_{stage:02d}"


_MODEL_STATES = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER_STATES = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


class _Unread:
    """Stands for DeepSpeed's objects in the files; none of them is needed here."""

    def __new__(cls, *_: Any) -> "_Unread":
        """Take any arguments."""
        return super().__new__(cls)


_STAND_INS: list[Any] = [
    (_Unread, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Unread, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Unread, "deepspeed.utils.tensor_fragment.fragment_address"),
]


def read_weights(
    directory: Path, config: ModelConfig, *, tensor_size: int, num_stages: int = 1
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the model, whole and in fp32, one at a time.

    Args:
        directory: where the engines of one checkpoint put their files.
        config: the model's sizes.
        tensor_size: tensor-parallel size that the checkpoint was written with.
        num_stages: pipeline stages that it was written with.

    Yields:
        Names and tensors, in the order of the files, stage after stage.

    Raises:
        CheckpointError: a file is missing or unreadable, or the parameters are not this model's.
    """
    stages = (stage_directory(directory, stage, num_stages) for stage in range(num_stages))
    weights = (pair for stage in stages for pair in _merged(stage / TAG, tensor_size))
    return checked_parameters(weights, config, directory)


def _merged(directory: Path, tensor_size: int) -> Iterator[tuple[str, Tensor]]:
    ranks = [_read_tensor_rank(directory, rank) for rank in range(tensor_size)]
    for name in ranks[0]:
        slices = []
        for number, rank in enumerate(ranks):
            if name not in rank:
                raise CheckpointError(
                    f"{directory}: tensor-parallel rank {number} lacks parameter {name}; "
                    "use a complete checkpoint"
                )
            slices.append(rank[name].tensor())
        try:
            yield name, merge_slices(slices, placement_of(name))
        except KeyError:
            raise CheckpointError(
                f"{directory}: parameter {name} is not one of this model's; "
                "use a checkpoint of this model"
            ) from None


class _Part(NamedTuple):
    """One tensor-parallel rank's parameter, as the pieces that lie in its files.

    Attributes:
        pieces: flat, in order; together they hold the parameter and then, maybe, padding.
        shape: of the parameter.
    """

    pieces: list[Tensor]
    shape: tuple[int, ...]

    def tensor(self) -> Tensor:
        """The parameter in fp32."""
        flat = torch.cat([piece.detach().flatten() for piece in self.pieces])
        return flat[: math.prod(self.shape)].view(self.shape).float()


def _read_tensor_rank(directory: Path, rank: int) -> dict[str, _Part]:
    """All parameters of one tensor-parallel rank, by name."""
    model_files = _files(directory, _MODEL_STATES, rank)
    if not model_files:
        raise CheckpointError(
            f"{directory} has no model states of tensor-parallel rank {rank} "
            f"(mp_rank_{rank:02d}_model_states.pt); use a complete checkpoint"
        )
    model_path = model_files[0]
    model_states = _load(model_path)
    optimizer_files = _files(directory, _OPTIMIZER_STATES, rank)
    try:
        if model_states["param_shapes"] is None:
            return _without_zero(model_path, model_states)
        trained = _with_zero(directory, rank, model_states["param_shapes"], optimizer_files)
        return trained | _frozen(model_files, trained.keys())
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{model_path} is not laid out as this version of DeepSpeed writes it "
            f"({type(error).__name__}: {error}); use the versions in constraints.txt"
        ) from error


def _frozen(paths: list[Path], trained: Collection[str]) -> dict[str, _Part]:
    """Parameters that no optimizer has: whole in ZeRO 1 and 2, in ZeRO 3 a share in each file."""
    states = [_load(path) for path in paths]
    if not paths[0].name.startswith("zero_pp_rank"):
        tensors = {k: v for k, v in states[0]["module"].items() if torch.is_tensor(v)}
        return {k: _Part([v], tuple(v.shape)) for k, v in tensors.items() if k not in trained}
    return {
        name: _Part([state["frozen_param_fragments"][name] for state in states], tuple(shape))
        for name, shape in (states[0]["frozen_param_shapes"] or {}).items()
    }


def _without_zero(path: Path, states: dict[str, Any]) -> dict[str, _Part]:
    weights = {name: value for name, value in states["module"].items() if torch.is_tensor(value)}
    masters = (states["optimizer"] or {}).get("fp32_groups")
    if masters is not None:
        weights = _named_masters(path, weights, masters)
    return {name: _Part([tensor], tuple(tensor.shape)) for name, tensor in weights.items()}


def _named_masters(
    path: Path, weights: dict[str, Tensor], groups: list[list[Tensor]]
) -> dict[str, Tensor]:
    """Master weights by name: the first group holds the matrices, the second the norm weights.

    Each is recognised by its place and confirmed by its value: rounded, it is the weight in use.
    A frozen weight has no master and is what it is.
    """
    tensors = [tensor for group in groups for tensor in group]
    trained = weights
    if len(tensors) < len(weights):
        trained = {name: w for name, w in weights.items() if is_trained(name, "trunk")}
    matrices = [name for name, weight in trained.items() if weight.dim() > 1]
    vectors = [name for name, weight in trained.items() if weight.dim() == 1]
    masters = dict(zip(matrices + vectors, tensors, strict=False))
    for name, weight in trained.items():
        if name not in masters or not torch.equal(masters[name].to(weight.dtype), weight):
            raise CheckpointError(
                f"{path}: the optimizer's master weight of {name} is not the one of the model; "
                "use a complete checkpoint"
            )
    return weights | masters


def _with_zero(
    directory: Path, rank: int, groups: list[dict[str, Any]], files: list[Path]
) -> dict[str, _Part]:
    states = [_load(path)["optimizer_state_dict"] for path in files]
    expected = _data_parallel_size(states[0]) if states else 1
    if len(states) != expected:
        raise CheckpointError(
            f"{directory} has {len(states)} of {expected} optimizer files of tensor-parallel rank "
            f"{rank} (*_mp_rank_{rank:02d}_optim_states.pt); use a complete checkpoint"
        )
    if "fp32_flat_groups" in states[0]:
        shapes = {name: tuple(shape) for group in groups for name, shape in group.items()}
        return _from_partitions([state["fp32_flat_groups"] for state in states], shapes)
    parts: dict[str, _Part] = {}
    paddings = states[0].get("param_alignment_paddings") or [None] * len(groups)
    for index, group in enumerate(groups):
        shapes = {name: tuple(shape) for name, shape in group.items()}
        slices = [state["single_partition_of_fp32_groups"][index] for state in states]
        parts |= _from_slices(slices, shapes, paddings[index] or [0] * len(shapes))
    return parts


def _data_parallel_size(state: dict[str, Any]) -> int:
    count = state["partition_count"]
    return max(count) if isinstance(count, list) else int(count)


def _from_slices(
    slices: list[Tensor], shapes: dict[str, tuple[int, ...]], paddings: list[int]
) -> dict[str, _Part]:
    """ZeRO 1 and 2: parameters lie one after the other in the concatenation of all slices."""
    parts = {}
    start = 0
    for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
        stop = start + math.prod(shape)
        parts[name] = _Part(_cut(slices, start, stop), shape)
        start = stop + padding
    return parts


def _from_partitions(
    flat_groups: list[list[Tensor]], shapes: dict[str, tuple[int, ...]]
) -> dict[str, _Part]:
    """ZeRO 3: of each parameter every rank holds one piece, all of the same padded length.

    Example: 10 elements over 4 ranks: pieces of 3, the last one with 2 elements of padding.
    """
    parts = {}
    start = 0
    for name, shape in shapes.items():
        stop = start + -(-math.prod(shape) // len(flat_groups))
        parts[name] = _Part(
            [piece for groups in flat_groups for piece in _cut(groups, start, stop)], shape
        )
        start = stop
    return parts


def _cut(tensors: list[Tensor], start: int, stop: int) -> list[Tensor]:
    """Elements start .. stop of the concatenation of flat tensors, without copying."""
    ends = list(accumulate(tensor.numel() for tensor in tensors))
    if stop > (ends[-1] if ends else 0):
        raise IndexError(f"elements up to {stop} of {ends[-1] if ends else 0}")
    pieces = []
    for tensor, end in zip(tensors, ends, strict=True):
        begin = end - tensor.numel()
        if begin < stop and start < end:
            pieces.append(tensor[max(start - begin, 0) : stop - begin])
    return pieces


def _files(directory: Path, pattern: re.Pattern[str], rank: int) -> list[Path]:
    """Files of one tensor-parallel rank, by data-parallel rank."""
    found = {}
    for path in directory.glob("*.pt"):
        match = pattern.fullmatch(path.name)
        if match and int(match[2]) == rank:
            found[int(match[1] or 0)] = path
    return [found[number] for number in sorted(found)]


def _load(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({str(error).splitlines()[0]}); use another checkpoint"
        ) from error
    assert isinstance(loaded, dict), path
    return loaded
