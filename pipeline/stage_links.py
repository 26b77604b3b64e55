"""What travels between neighbouring stages, and how long a stage waits for it.

Transfers do not block: a send goes on in the background while the stage computes, and the next
receive is posted before it is needed. A stage therefore waits only for what is not there yet, and
that time is its idle time.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.topology import Topology

# Sends that may be under way on one link: the one being read and the next.
_MAX_SENDS = 2


class IdleClock:
    """Counts the time this rank waits for others.

    On a GPU a wait holds up the stream, not the process: events on the stream measure it.

    Attributes:
        waiting_for: what the rank waits for, or on a GPU asked for last; None between steps.
    """

    def __init__(self, device: torch.device) -> None:
        self.waiting_for: str | None = None
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    def wait(self, work: Any, what: str) -> None:
        """Wait for a transfer or collective to end; `what` completes "waits for ..."."""
        self.waiting_for = what
        if self._on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work.wait()
            end.record()
            self._events.append((begin, end))
            return
        started = time.perf_counter()
        work.wait()
        self._seconds += time.perf_counter() - started
        self.waiting_for = None

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Waiting in here does not count."""
        before = self.take()
        yield
        self.take()
        self._seconds = before

    def take(self) -> float:
        """Seconds waited since the last call."""
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds += sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
            self._events.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class Sender:
    """Sends tensors to one rank in order, in the background.

    Args:
        group: where the transfers happen.
        peer: global rank of the receiver.
        clock: counts waiting.
        what: what is sent and to whom, for messages.
    """

    def __init__(self, group: dist.ProcessGroup, peer: int, clock: IdleClock, what: str) -> None:
        self._group, self._peer, self._clock, self._what = group, peer, clock, what
        self._under_way: deque[tuple[Any, Tensor]] = deque()

    def send(self, tensor: Tensor) -> None:
        """Start sending; the tensor is kept until it has arrived and must not be changed."""
        if len(self._under_way) >= _MAX_SENDS:
            self._finish_oldest()
        tensor = tensor.detach().contiguous()
        self._under_way.append((dist.isend(tensor, self._peer, group=self._group), tensor))

    def finish(self) -> None:
        """Wait until everything has been sent."""
        while self._under_way:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        work, _ = self._under_way.popleft()
        self._clock.wait(work, f"the sending of {self._what}")


class Receiver:
    """Receives tensors from one rank in order, the next one posted ahead.

    Args:
        group: where the transfers happen.
        peer: global rank of the sender.
        clock: counts waiting.
        what: what is received and from whom, for messages.
        dtype: of the tensors.
        device: where they go.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        peer: int,
        clock: IdleClock,
        what: str,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._group, self._peer, self._clock, self._what = group, peer, clock, what
        self._dtype, self._device = dtype, device
        self._shapes: deque[tuple[int, ...]] = deque()
        self._posted: tuple[Any, Tensor] | None = None
        self._count = 0

    def expect(self, shapes: Iterable[tuple[int, ...]]) -> None:
        """Announce what will come, in order; the first receive is posted at once."""
        assert self._posted is None, f"{len(self._shapes) + 1} tensors of the last step are missing"
        self._shapes.extend(shapes)
        self._count = 0
        self._post_next()

    def receive(self) -> Tensor:
        """The next tensor, once it is here."""
        assert self._posted is not None, "more was asked for than announced"
        work, tensor = self._posted
        self._clock.wait(work, f"the {self._what}, micro-batch {self._count}")
        self._count += 1
        self._post_next()
        return tensor

    def _post_next(self) -> None:
        self._posted = None
        if self._shapes:
            tensor = torch.empty(self._shapes.popleft(), dtype=self._dtype, device=self._device)
            self._posted = (dist.irecv(tensor, self._peer, group=self._group), tensor)


class StageLinks:
    """The links of this rank's stage to its neighbours; those that do not exist are None.

    Args:
        topology: the grid of ranks, with more than one stage.
        dtype: of activations and their gradients.
    """

    def __init__(self, topology: Topology, dtype: torch.dtype) -> None:
        self.clock = IdleClock(topology.device)
        forward, backward = topology.activation_group, topology.gradient_group
        assert forward is not None, "one stage has no links"
        assert backward is not None, "one stage has no links"
        self.activations_in: Receiver | None = None
        self.activations_out: Sender | None = None
        self.gradients_in: Receiver | None = None
        self.gradients_out: Sender | None = None
        kind: dict[str, Any] = {"dtype": dtype, "device": topology.device}
        if not topology.is_first_stage:
            peer = topology.rank_of_stage(topology.stage - 1)
            name = topology.describe_rank(peer)
            self.activations_in = Receiver(
                forward, peer, self.clock, f"activations from {name}", **kind
            )
            self.gradients_out = Sender(backward, peer, self.clock, f"gradients to {name}")
        if not topology.is_last_stage:
            peer = topology.rank_of_stage(topology.stage + 1)
            name = topology.describe_rank(peer)
            self.activations_out = Sender(forward, peer, self.clock, f"activations to {name}")
            self.gradients_in = Receiver(
                backward, peer, self.clock, f"gradients from {name}", **kind
            )

    def finish_sends(self) -> None:
        """Wait until what this stage sent has arrived."""
        for sender in (self.activations_out, self.gradients_out):
            if sender is not None:
                sender.finish()
