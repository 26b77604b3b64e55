"""What travels between neighboring stages, and how long a stage waits for it.

Transfers do not block: a send goes on in the background while the stage computes, and the next
receive is posted before it is needed. A stage therefore waits only for what is not there yet, and
that time is its idle time.

A posted receive keeps a GPU busy until the other stage sends. Whoever waits for the whole GPU then
waits for that stage, which may be waiting for this one: see `StageRunner`.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.distributed.topology import Topology

# Sends that may be under way on one link: the one being read and the next.
_MAX_SENDS = 2


class _Wait(NamedTuple):
    """A wait on a GPU's stream, between two events."""

    what: str
    begin: Any
    end: Any


class IdleClock:
    """Counts the time this rank waits for others, and the time of the steps it does so in.

    On a GPU a wait holds up the stream, not the process, which runs ahead: events on the stream
    measure both times.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._waited_s = 0.0
        self._elapsed_s = 0.0
        self._waiting_for: str | None = None
        # On a GPU: of the last step, not yet added up.
        self._waits: list[_Wait] = []
        self._steps: list[tuple[Any, Any]] = []

    @property
    def waiting_for(self) -> str | None:
        """What the rank waits for, None while it does not; any thread may ask."""
        if not self._on_gpu:
            return self._waiting_for
        try:
            ahead = next((wait for wait in list(self._waits) if not wait.end.query()), None)
            return ahead.what if ahead and ahead.begin.query() else None
        except RuntimeError:  # the GPU has failed, which others report
            return None

    def wait(self, work: Any, what: str) -> None:
        """Wait for a transfer or collective to end; `what` completes "waits for ..."."""
        if self._on_gpu:
            begin = _event()
            work.wait()
            self._waits.append(_Wait(what, begin, _event()))
            return
        self._waiting_for = what
        started = time.perf_counter()
        work.wait()
        self._waited_s += time.perf_counter() - started
        self._waiting_for = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """What happens in here is the time of which waiting is a share."""
        self._add_up()  # the last step's; it has ended long ago
        if self._on_gpu:
            begin = _event()
            yield
            self._steps.append((begin, _event()))
            return
        started = time.perf_counter()
        yield
        self._elapsed_s += time.perf_counter() - started

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Waiting in here does not count."""
        self._add_up()
        before = self._waited_s
        yield
        self._waits.clear()
        self._waited_s = before

    def take(self) -> tuple[float, float]:
        """Seconds waited, and seconds of steps, since the last call."""
        self._add_up()
        taken = self._waited_s, self._elapsed_s
        self._waited_s = self._elapsed_s = 0.0
        return taken

    def _add_up(self) -> None:
        """Turn events into seconds, and forget them."""
        if not self._steps:
            return
        self._steps[-1][1].synchronize()
        self._waited_s += sum(wait.begin.elapsed_time(wait.end) for wait in self._waits) / 1000
        self._elapsed_s += sum(begin.elapsed_time(end) for begin, end in self._steps) / 1000
        self._waits.clear()
        self._steps.clear()


def _event() -> Any:
    """Now, on the stream."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


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
        self._ahead = True
        self._count = 0

    def expect(self, shapes: Iterable[tuple[int, ...]], *, ahead: bool = True) -> None:
        """Announce what will come, in order.

        Args:
            shapes: of the tensors.
            ahead: post the first receive at once, and each other one as soon as the one before it
                has ended; else only when it is asked for, until `look_ahead`.
        """
        assert self._posted is None, f"{len(self._shapes) + 1} tensors of the last step are missing"
        self._shapes.extend(shapes)
        self._count = 0
        self._ahead = False
        if ahead:
            self.look_ahead()

    def look_ahead(self) -> None:
        """Post what comes next, now and from now on."""
        self._ahead = True
        self._post_next()

    def receive(self) -> Tensor:
        """The next tensor, once it is here."""
        if not self._ahead:
            self._post_next()
        assert self._posted is not None, "more was asked for than announced"
        work, tensor = self._posted
        self._posted = None
        self._clock.wait(work, f"the {self._what}, micro-batch {self._count}")
        self._count += 1
        if self._ahead:
            self._post_next()
        return tensor

    def _post_next(self) -> None:
        if self._shapes:
            tensor = torch.empty(self._shapes.popleft(), dtype=self._dtype, device=self._device)
            self._posted = (dist.irecv(tensor, self._peer, group=self._group), tensor)


class StageLinks:
    """The links of this rank's stage to its neighbors; those that do not exist are None.

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
        with self.clock.uncounted():
            self._connect(torch.zeros(1, **kind))

    def _connect(self, tensor: Tensor) -> None:
        """A first transfer over every link, in one order along the chain.

        NCCL connects two ranks in their first transfer and holds both processes up until it has.
        In a step each of two neighbors begins by receiving what the other sends later: connecting
        there, both would wait without end.
        """
        before = (self.activations_in, self.gradients_out)
        after = (self.activations_out, self.gradients_in)
        for link in (*before, *after):
            if isinstance(link, Receiver):
                link.expect([tuple(tensor.shape)])
                link.receive()
            elif link is not None:
                link.send(tensor)
                link.finish()

    def finish_sends(self) -> None:
        """Wait until what this stage sent has arrived."""
        for sender in (self.activations_out, self.gradients_out):
            if sender is not None:
                sender.finish()
