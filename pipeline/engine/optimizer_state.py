"""Where this rank's share of weights and Adam moments lies in DeepSpeed's optimizers.

Every ZeRO stage keeps them elsewhere; here each becomes flat fp32 views by parameter, which can be
saved from and loaded into.

    ZeRO 0    whole parameters on every data-parallel rank (bf16: DeepSpeed's fp32 copies)
    ZeRO 1, 2 one flat partition per parameter group; a parameter's fragment of it, if any
    ZeRO 3    a padded share of every parameter
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Fragment(NamedTuple):
    """This rank's run of a parameter's elements.

    Attributes:
        name: of the parameter.
        start: first element, in the flattened tensor-parallel slice.
        views: flat views by kind, `weight` and for trained parameters both moments; writing to
            them changes the optimizer.
        owned: the run of elements, within the views, that no other data-parallel rank holds as
            well or that falls to this rank to save.
    """

    name: str
    start: int
    views: dict[str, Tensor]
    owned: slice

    @property
    def stop(self) -> int:
        """End of the run in the flattened tensor-parallel slice."""
        return self.start + self.views["weight"].numel()


def fragments(
    model: nn.Module, optimizer: Any, *, zero: int, data_rank: int, data_size: int
) -> Iterator[Fragment]:
    """This rank's fragments of all parameters of its part of the model.

    Args:
        model: the engine's module.
        optimizer: the engine's optimizer.
        zero: ZeRO stage.
        data_rank: data-parallel rank.
        data_size: number of those.
    """
    states = prepare_states(optimizer)
    masters = _unfused_masters(optimizer)
    for name, parameter in model.named_parameters():
        if zero == 3:
            yield _share(name, parameter, data_rank)
            continue
        mapping = getattr(parameter, "_hp_mapping", None)
        if zero and parameter.requires_grad:
            if mapping is not None:
                flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
                address = mapping.hp_fragment_address
                run = slice(address.start, address.start + address.numel)
                views = {"weight": flat.data[run]} | {k: states[flat][k][run] for k in _MOMENTS}
                yield Fragment(name, mapping.lp_fragment_address.start, views, slice(None))
            continue
        # Whole on every data-parallel rank: each saves its share of it.
        master = masters.get(parameter, parameter)
        views = {"weight": master.data.view(-1)}
        if parameter.requires_grad:
            views |= {kind: states[master][kind].view(-1) for kind in _MOMENTS}
        count = parameter.numel()
        share = slice(count * data_rank // data_size, count * (data_rank + 1) // data_size)
        yield Fragment(name, 0, views, share)


def _share(name: str, parameter: Any, data_rank: int) -> Fragment:
    """ZeRO-3's share; the last ranks' shares are padded, or nothing but padding."""
    length = parameter.ds_tensor.ds_numel
    start = min(data_rank * length, parameter.ds_numel)
    run = slice(0, min(length, parameter.ds_numel - start))
    if not parameter.requires_grad:
        return Fragment(name, start, {"weight": parameter.ds_tensor.data[run]}, slice(None))
    optimizer = parameter._z3_optimizer
    views = {"weight": optimizer.get_local_fp32_param(parameter).data[run]}
    for kind in _MOMENTS:
        views[kind] = optimizer.get_local_fp32_param(parameter, kind)[run]
    return Fragment(name, start, views, slice(None))


def prepare_states(optimizer: Any) -> dict[Tensor, dict[str, Tensor]]:
    """Adam's state of every tensor it steps; zeros, as before its first step, if it has none."""
    inner: torch.optim.AdamW = _torch_optimizer(optimizer)
    for tensor in _stepped(optimizer, inner):
        if not inner.state[tensor]:
            device = tensor.device if inner.defaults["fused"] else "cpu"
            inner.state[tensor] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                **{kind: torch.zeros_like(tensor.data) for kind in _MOMENTS},
            }
    return inner.state


def _stepped(optimizer: Any, inner: torch.optim.AdamW) -> Iterator[Tensor]:
    """The tensors that Adam steps; ZeRO-3 hands them to it only while it does."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        yield from optimizer.fp32_partitioned_groups_flat
        return
    for group in inner.param_groups:
        yield from group["params"]


def adam_step(optimizer: Any) -> int:
    """Steps that Adam has taken."""
    steps = [int(state["step"]) for state in prepare_states(optimizer).values()]
    return max(steps, default=0)


def set_adam_step(optimizer: Any, step: int) -> None:
    """Let Adam count on from here."""
    for state in prepare_states(optimizer).values():
        state["step"].fill_(step)


def refresh_weights(model: nn.Module, optimizer: Any, *, zero: int) -> None:
    """Give the weights that the model computes with the values that were loaded; a collective."""
    if zero == 3:
        for partitioned in map(_partitioned, model.parameters()):
            if partitioned.requires_grad:
                master = partitioned._z3_optimizer.get_local_fp32_param(partitioned)
                partitioned.ds_tensor.data.copy_(master.data)
        if whole := optimizer.persistent_parameters:
            whole[0].partition(whole)
            whole[0].all_gather(whole)
    elif zero:
        for index, parts in enumerate(optimizer.parallel_partitioned_bit16_groups):
            group = optimizer.real_dp_process_group[index]
            mine = parts[dist.get_rank(group)]
            mine.data.copy_(optimizer.single_partition_of_fp32_groups[index].data)
            dist.all_gather(list(parts), mine.clone(), group=group)
    else:
        for weight, master in _unfused_masters(optimizer).items():
            weight.data.copy_(master.data)


def _partitioned(parameter: nn.Parameter) -> Any:
    """A parameter with what ZeRO-3 has attached to it."""
    return parameter


def _torch_optimizer(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", optimizer)


def _unfused_masters(optimizer: Any) -> dict[Tensor, Tensor]:
    """The fp32 copies that DeepSpeed trains in bf16 runs without ZeRO, by parameter."""
    if not hasattr(optimizer, "fp32_groups"):
        return {}
    groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return {p: master for group in groups for p, master in zip(*group, strict=True)}
