"""Everything that this project reads or changes inside DeepSpeed; no other file does.

DeepSpeed has no public way to find a rank's own share of weights and Adam moments at every ZeRO
level, to forget the gradients of a step that is not taken, or to keep several micro-batches
between forward and backward. What is used instead is private, so it may change with any release:
every private attribute is read by `_private`, which says what is missing and what to install, and
`pipeline.checkpoint.coverage` checks at start that the shares found here cover the model.

Where a rank's share lies:

    level 0     whole parameters on every data-parallel rank
    level 1, 2  one flat partition per parameter group; a parameter's fragment of it, if any
    level 3     a padded share of every parameter
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.constants import BFLOAT16
from deepspeed.runtime.engine import ZERO_OPTIMIZATION
from deepspeed.runtime.zero import partitioned_param_coordinator
from deepspeed.utils import (
    groups,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
)
from torch import Tensor, nn

from model.errors import ConfigError
from model.operations.compiled import compiled, plain_add_
from pipeline.engine.optimizer_share import MOMENTS, Fragment, OptimizerShare

TESTED_VERSIONS = ">=0.19.8,<=0.19.8"


class _WholeParameters(OptimizerShare):
    """No ZeRO: DeepSpeed's optimizer is torch's own, on the model's parameters."""

    deepspeed_clips = False

    def fragments(self) -> Iterator[Fragment]:
        """This rank's fragments of all parameters."""
        self.states()
        for name, parameter in self._model.named_parameters():
            yield self._whole(name, parameter, parameter)

    def refresh_weights(self) -> None:
        """The weights that were loaded are those that the model computes with."""

    def gradients(self) -> Iterator[Tensor]:
        """This rank's reduced gradients."""
        for parameter in self._model.parameters():
            if parameter.grad is not None:
                yield parameter.grad

    def discard_gradients(self) -> None:
        """Forget the gradients of a step that will not be taken."""
        self._engine.zero_grad()
        self._optimizer.zero_grad()

    def _adam(self) -> torch.optim.AdamW:
        adam: torch.optim.AdamW = self._optimizer
        return adam


class _FlatPartitions(OptimizerShare):
    """ZeRO 1 and 2: one flat fp32 partition per parameter group on each data-parallel rank."""

    def fragments(self) -> Iterator[Fragment]:
        """This rank's fragments of all parameters."""
        partitions = _private(self._optimizer, "single_partition_of_fp32_groups")
        states = self.states()
        for name, parameter in self._model.named_parameters():
            if not parameter.requires_grad:
                yield self._whole(name, parameter, parameter)
                continue
            mapping = _private(parameter, "_hp_mapping")
            if mapping is None:
                continue  # all of it lies in other ranks' partitions
            flat = partitions[_private(mapping, "param_group_index")]
            address = _private(mapping, "hp_fragment_address")
            run = slice(address.start, address.start + address.numel)
            views = {"weight": flat.data[run]} | {k: states[flat][k][run] for k in MOMENTS}
            start = _private(mapping, "lp_fragment_address").start
            yield Fragment(name, start, views, slice(None))

    def refresh_weights(self) -> None:
        """Copy loaded fp32 weights into those that the model computes with; a collective."""
        partitions = _private(self._optimizer, "single_partition_of_fp32_groups")
        groups = _private(self._optimizer, "real_dp_process_group")
        for index, parts in enumerate(
            _private(self._optimizer, "parallel_partitioned_bit16_groups")
        ):
            mine = parts[dist.get_rank(groups[index])]
            mine.data.copy_(partitions[index].data)
            dist.all_gather(list(parts), mine.clone(), group=groups[index])

    def gradients(self) -> Iterator[Tensor]:
        """This rank's reduced gradients."""
        for gradients in _private(self._optimizer, "averaged_gradients").values():
            yield from (gradient for gradient in gradients or () if gradient is not None)

    def discard_gradients(self) -> None:
        """Forget the gradients of a step that will not be taken."""
        self._optimizer.zero_grad()
        for name in ("averaged_gradients", "all_grad_tensors"):
            sums = _private(self._optimizer, name)
            for index in list(sums):
                sums[index] = None
        for parameter in self._model.parameters():
            if parameter.requires_grad:
                _private(parameter, "grad_accum")
                parameter.grad_accum = None  # type: ignore[attr-defined]
        _private(self._optimizer, "micro_step_id")
        self._optimizer.micro_step_id = -1  # DeepSpeed's value between steps

    def begin_backward(self) -> None:
        """Let the coming backward add to the step's earlier ones."""
        # DeepSpeed counts a micro-batch when the next forward begins, which may be never.
        _private(self._optimizer, "clear_backward_seen_flag")()

    def _adam(self) -> torch.optim.AdamW:
        return _wrapped_adam(self._optimizer)


class _ShardedParameters(OptimizerShare):
    """ZeRO 3: each data-parallel rank holds a padded share of every parameter."""

    _TO_COME = "ds_grads_remaining"

    def __init__(self, engine: Any, data_rank: int, data_size: int) -> None:
        super().__init__(engine, data_rank, data_size)
        self._begins_trace = True

    def fragments(self) -> Iterator[Fragment]:
        """This rank's fragments of all parameters."""
        self.states()
        for name, parameter in self._model.named_parameters():
            share = _private(parameter, "ds_tensor")
            length, count = _private(share, "ds_numel"), _private(parameter, "ds_numel")
            start = min(self._data_rank * length, count)
            run = slice(0, min(length, count - start))  # without the padding
            if parameter.requires_grad:
                views = {"weight": safe_get_local_fp32_param(parameter).data[run]}
                for kind in MOMENTS:
                    views[kind] = safe_get_local_optimizer_state(parameter, kind)[run]
            else:
                views = {"weight": share.data[run]}
            yield Fragment(name, start, views, slice(None))

    def refresh_weights(self) -> None:
        """Copy loaded fp32 weights into those that the model computes with; a collective."""
        for parameter in self._model.parameters():
            if parameter.requires_grad:
                master = safe_get_local_fp32_param(parameter)
                _private(parameter, "ds_tensor").data.copy_(master.data)
        whole = _private(self._optimizer, "persistent_parameters")
        if whole:
            _private(whole[0], "partition")(whole)
        for parameter in self._model.parameters():
            # The copy among neighbors (`gather_weights_within`), which the next forward makes anew.
            _private(parameter, "ds_secondary_tensor")
            parameter.ds_secondary_tensor = None  # type: ignore[attr-defined]
        if whole:
            _private(whole[0], "all_gather")(whole)

    def gradients(self) -> Iterator[Tensor]:
        """This rank's reduced gradients."""
        yield _private(self._optimizer, "grad_partitions_flat_buffer")

    def discard_gradients(self) -> None:
        """Forget the gradients of a step that will not be taken."""
        self._optimizer.zero_grad()
        _private(self._optimizer, "averaged_gradients")
        self._optimizer.averaged_gradients = {}

    def begin_backward(self) -> None:
        """Let the coming backward add to the step's earlier ones."""
        _private(self._optimizer, "clear_backward_seen_flag")()

    def trace_whole_steps(self, group: dist.ProcessGroup) -> None:
        """Begin the trace with a step, not with every forward, and compare it within `group`.

        DeepSpeed's own trace begins anew with every forward and assumes that the backward of the
        same micro-batch follows; with several in flight it would never hold.
        """
        _confine_trace_check(group)
        offload = _private(self._optimizer, "parameter_offload")
        _private(offload, "fwd_pre_hook").remove()
        coordinator = _private(offload, "get_param_coordinator")

        def begin(_module: nn.Module, _inputs: Any) -> None:
            if self._begins_trace:
                self._begins_trace = False
                _private(coordinator(), "reset_step")()

        self._model.register_forward_pre_hook(begin, prepend=True)

    def begin_trace(self) -> None:
        """A step's first forward is about to run."""
        self._begins_trace = True

    def gradients_to_come(self) -> list[tuple[nn.Module, int]]:
        """What ZeRO-3 waits for, per module, in the coming backward."""
        found = [
            (module, module.__dict__[self._TO_COME])
            for module in self._model.modules()
            if self._TO_COME in module.__dict__
        ]
        if not found:
            raise _missing("the modules of a ZeRO-3 model", self._TO_COME)
        return found

    def expect_gradients(self, to_come: list[tuple[nn.Module, int]]) -> None:
        """Restore what `gradients_to_come` gave."""
        for module, count in to_come:
            module.__dict__[self._TO_COME] = count

    def _stepped(self) -> Iterator[Tensor]:
        # ZeRO-3 hands them to Adam only while it steps.
        yield from _private(self._optimizer, "fp32_partitioned_groups_flat")

    def _adam(self) -> torch.optim.AdamW:
        return _wrapped_adam(self._optimizer)


def share_of(engine: Any, *, level: int, data_rank: int, data_size: int) -> OptimizerShare:
    """This rank's share, found in an engine.

    Args:
        engine: what `deepspeed.initialize` returned.
        level: its ZeRO level.
        data_rank: data-parallel rank.
        data_size: number of data-parallel ranks.

    Raises:
        ConfigError: this version of DeepSpeed is not the one that this file knows.
    """
    kinds = (_WholeParameters, _FlatPartitions, _FlatPartitions, _ShardedParameters)
    return kinds[level](engine, data_rank, data_size)


@contextlib.contextmanager
def fp32_sums_at_level_1() -> Iterator[None]:
    """Within it DeepSpeed makes its engine at level 1 with the optimizer of levels 1 and 2.

    For bf16 weights and fp32 sums it would choose another class at level 1, which clears gradients
    at the start of a backward: those that heads have received by then would be lost. The class of
    level 2 adds up in fp32 and, told not to divide gradients, reduces them once a step.
    """
    choose = _private(deepspeed.DeepSpeedEngine, "_do_optimizer_sanity_check")

    def always_flat_partitions(engine: Any, optimizer: Any) -> Any:
        chosen = choose(engine, optimizer)
        return ZERO_OPTIMIZATION if chosen == BFLOAT16 else chosen

    deepspeed.DeepSpeedEngine._do_optimizer_sanity_check = always_flat_partitions
    try:
        yield
    finally:
        deepspeed.DeepSpeedEngine._do_optimizer_sanity_check = choose


def add_gradients_in_one_pass(engine: Any, is_compiled: bool) -> None:
    """Let bf16 gradients be added as they are to the fp32 sums of levels that keep such.

    DeepSpeed makes an fp32 copy of each first: the same bits, and twice the traffic of memory.

    Args:
        engine: what `deepspeed.initialize` returned.
        is_compiled: by a kernel that torch.compile makes.
    """
    if not getattr(engine.optimizer, "use_grad_accum_attribute", False):
        return

    def add(parameter: nn.Parameter) -> None:
        gradient, total = parameter.grad, _private(parameter, "grad_accum")
        if gradient is None:
            return
        if total is None:
            dtype = _private(engine.optimizer, "gradient_accumulation_dtype")
            parameter.grad_accum = gradient.to(dtype)  # type: ignore[attr-defined]
        elif is_compiled and total.is_contiguous() and gradient.is_contiguous():
            # As one row, all parameters have one kernel.
            compiled(plain_add_)(total.view(-1), gradient.view(-1))
        else:
            total.add_(gradient.view(total.shape))
        parameter.grad = None

    _private(engine.optimizer, "_fill_param_grad_accum_attribute")
    engine.optimizer._fill_param_grad_accum_attribute = add


def gather_weights_within(neighbors: dist.ProcessGroup | None) -> None:
    """Let ZeRO-3 keep a copy of the weights among these data-parallel ranks; None = no copy.

    DeepSpeed's own groups count over the world's ranks, so that they would join tensor-parallel
    ones, whose weights are not the same.
    """
    _private(groups, "_ZERO_PARAM_INTRA_PARALLEL_GROUP")
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = neighbors


def keep_off_shared_memory() -> None:
    """Let DeepSpeed communicate by torch.distributed alone.

    On a CPU each rank would compile an op for it at start; a rank killed meanwhile leaves a lock
    file behind that makes every later start on the machine wait without end.
    """
    _private(deepspeed.ops, "__compatible_ops__")["deepspeed_shm_comm"] = False


def _confine_trace_check(group: dist.ProcessGroup) -> None:
    """Let ZeRO-3 compare the order of its modules among the ranks that run the same ones.

    DeepSpeed compares it with world rank 0, which with pipeline stages runs other modules, or
    none at that time: the comparison would never be answered. The replacement is for the whole
    process, which has one engine.
    """

    def assert_same(numbers: list[int]) -> None:
        gathered: list[list[int]] = [[] for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(gathered, numbers, group=group)
        if any(other != numbers for other in gathered):
            raise RuntimeError(f"data-parallel ranks disagree on a trace of {len(numbers)} entries")

    _private(partitioned_param_coordinator, "assert_ints_same_as_other_ranks")
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = assert_same


def _wrapped_adam(optimizer: Any) -> torch.optim.AdamW:
    """The torch optimizer inside DeepSpeed's."""
    adam: torch.optim.AdamW = _private(optimizer, "optimizer")
    return adam


def _private(owner: Any, name: str) -> Any:
    """A private attribute of DeepSpeed's.

    Raises:
        ConfigError: this version has no such attribute.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        what = owner.__name__ if hasattr(owner, "__name__") else type(owner).__name__
        raise _missing(what, name) from None


def _missing(owner: str, name: str) -> ConfigError:
    return ConfigError(
        f"DeepSpeed {deepspeed.__version__} is not supported: {owner} has no {name!r}, which "
        "checkpoints, skipped steps and pipeline stages need; install a tested version: "
        f"pip install 'deepspeed{TESTED_VERSIONS}'"
    )
