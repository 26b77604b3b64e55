"""What a rank owns of weights, gradients and Adam's moments, whatever the ZeRO level keeps where.

Where that is, `pipeline.engine.deepspeed_internals` knows.
"""

import abc
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


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


class MicroBatchesInFlight:
    """What DeepSpeed has to know when several micro-batches are between forward and backward.

    Only ZeRO counts on there being one, so without it there is nothing to do.
    """

    def begin_backward(self) -> None:
        """Let the coming backward add to the gradients of the step's earlier ones."""

    def trace_whole_steps(self, group: dist.ProcessGroup) -> None:
        """Let ZeRO-3 learn the order of modules of a whole step, compared within `group` only."""

    def begin_trace(self) -> None:
        """A step's first forward, or an evaluation's, is about to run."""

    def gradients_to_come(self) -> list[tuple[nn.Module, int]]:
        """What ZeRO-3 waits for, per module, before it frees weights in the coming backward.

        Every forward sets it anew; the backward of an earlier micro-batch needs the earlier one.
        """
        return []

    def expect_gradients(self, to_come: list[tuple[nn.Module, int]]) -> None:
        """Restore what `gradients_to_come` gave after the forward of a micro-batch."""


class OptimizerShare(MicroBatchesInFlight, abc.ABC):
    """What a rank owns of weights, gradients and moments; one subclass per kind of optimizer.

    Args:
        engine: what `deepspeed.initialize` returned.
        data_rank: data-parallel rank.
        data_size: number of data-parallel ranks.

    Attributes:
        deepspeed_clips: whether DeepSpeed computes the gradient norm and clips when it steps.
    """

    deepspeed_clips = True

    def __init__(self, engine: Any, data_rank: int, data_size: int) -> None:
        self._engine = engine
        self._model: nn.Module = engine.module
        self._optimizer: Any = engine.optimizer
        self._data_rank = data_rank
        self._data_size = data_size

    @abc.abstractmethod
    def fragments(self) -> Iterator[Fragment]:
        """This rank's fragments of all parameters of its part of the model."""

    @abc.abstractmethod
    def refresh_weights(self) -> None:
        """Copy loaded fp32 weights into those that the model computes with; a collective."""

    @abc.abstractmethod
    def gradients(self) -> Iterator[Tensor]:
        """This rank's reduced gradients, at the end of a step's last backward."""

    @abc.abstractmethod
    def discard_gradients(self) -> None:
        """Forget the gradients of a step that will not be taken."""

    @abc.abstractmethod
    def _adam(self) -> torch.optim.AdamW:
        """The torch optimizer that DeepSpeed steps."""

    def _stepped(self) -> Iterator[Tensor]:
        """The tensors that Adam updates."""
        for group in self._adam().param_groups:
            yield from group["params"]

    def states(self) -> dict[Tensor, dict[str, Tensor]]:
        """Adam's state of every tensor it updates; zeros, as before its first step, if none yet."""
        adam = self._adam()
        for tensor in self._stepped():
            if not adam.state[tensor]:
                adam.state[tensor] = {
                    "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
                    **{kind: torch.zeros_like(tensor.data) for kind in MOMENTS},
                }
        return adam.state

    @property
    def adam_step(self) -> int:
        """Steps that Adam has taken."""
        return max((int(state["step"]) for state in self.states().values()), default=0)

    @adam_step.setter
    def adam_step(self, step: int) -> None:
        for state in self.states().values():
            state["step"].fill_(step)

    def gradients_finite(self, device: torch.device) -> Tensor:
        """Whether the gradients of this rank are finite: a bool on `device`, without a host sync.

        The extremes of a tensor are finite only if all of it is, and need no copy of it.
        """
        finite = torch.ones((), dtype=torch.bool, device=device)
        for gradient in self.gradients():
            if gradient.numel():
                low, high = torch.aminmax(gradient)
                finite &= low.isfinite() & high.isfinite()
        return finite

    def _whole(self, name: str, parameter: nn.Parameter, master: Tensor) -> Fragment:
        """A parameter that every data-parallel rank holds whole: each saves its share of it."""
        views = {"weight": master.data.view(-1)}
        if parameter.requires_grad:
            state = self._adam().state[master]
            views |= {kind: state[kind].view(-1) for kind in MOMENTS}
        count = parameter.numel()
        rank, size = self._data_rank, self._data_size
        return Fragment(name, 0, views, slice(count * rank // size, count * (rank + 1) // size))
