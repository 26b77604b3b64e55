"""How a GPU would wait: the stages' real order of work, played through with CUDA's rules.

On a CPU a transfer holds up the process, on a GPU a stream: the process runs ahead, unless it asks
for the whole device to finish. `record` runs `StageRunner` and its links with stand-ins for the
model and the network and writes down what they enqueue; `hangs` plays all stages' records through:

    a computation   runs after everything enqueued on its stream before it
    a transfer      begins when what was computed before it is done, on both sides, and ends when
                    both have begun it; transfers of one NCCL communicator run one after the other
    a wait          holds up the computations behind it until a transfer has ended
    a device sync   holds up the process until all it enqueued is done, receives posted ahead too
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from data_prep.loading.loader import Batch
from model.backward import ChainInputs, HeadsResult
from model.lm_head import LMHeadWeights
from model.structure.part import ModelPart
from pipeline.stages import links as links_module
from pipeline.stages import runner as runner_module
from pipeline.stages.costs import micro_batch_order
from pipeline.stages.links import IdleClock, Receiver, Sender
from pipeline.stages.plan import depths, num_depths
from pipeline.stages.runner import MicroBatchEngine, StageRunner

HIDDEN, HEADS = 2, 4
SyncAt = Literal["never", "forward", "backward", "first launch"]


class Event(NamedTuple):
    """One thing that a stage's process does.

    Attributes:
        kind: what.
        transfer: which one, the same for all who take part in it.
        parties: how many take part.
        communicator: what its transfers queue on.
    """

    kind: Literal["compute", "enqueue", "wait", "sync"]
    transfer: Any = None
    parties: int = 0
    communicator: Any = None


class _Network:
    """Stands for `torch.distributed` of one stage, and writes down what it is asked for."""

    def __init__(self, stage: int, plan: Sequence[ModelPart], one_queue: bool) -> None:
        self.events: list[Event] = []
        self._stage, self._plan, self._one_queue = stage, plan, one_queue
        self._counts: dict[Any, int] = {}

    def isend(self, _: Tensor, peer: int, group: str) -> Any:
        return self._enqueue((group, self._stage, peer), 2, group, peer)

    def irecv(self, _: Tensor, peer: int, group: str) -> Any:
        return self._enqueue((group, peer, self._stage), 2, group, peer)

    def all_reduce(self, _: Tensor, group: str, async_op: bool) -> Any:
        return self._enqueue((group, "all"), len(self._plan), group, None)

    def reduce(self, _: Tensor, __: int, group: str, async_op: bool) -> Any:
        parties = sum(bool(part.heads) for part in self._plan)
        return self._enqueue((group, "all"), parties, group, None)

    def _enqueue(self, name: Any, parties: int, group: str, peer: int | None) -> Any:
        number = self._counts[name] = self._counts.get(name, 0) + 1
        # NCCL makes a communicator for each pair when its groups are made lazily.
        between = None if peer is None or self._one_queue else frozenset((self._stage, peer))
        transfer = (name, number)
        self.events.append(Event("enqueue", transfer, parties, (group, between)))
        return SimpleNamespace(wait=lambda: self.events.append(Event("wait", transfer)))


def record(
    plan: Sequence[ModelPart],
    stage: int,
    micro_batches: int,
    *,
    steps: int = 2,
    sync_at: SyncAt = "never",
    one_queue: bool = False,
    chain: bool = False,
    first_alone: bool = True,
) -> list[Event]:
    """What a stage's process does in some steps.

    Args:
        plan: what each stage holds.
        stage: which one.
        micro_batches: of a step.
        steps: how many.
        sync_at: where the stage waits for its whole device, if anywhere; `first launch` = in the
            first computation of each kind.
        one_queue: all transfers of a group on one communicator, as with a `device_id`.
        chain: whether heads read one another.
        first_alone: a run's first micro-batch passes before any other begins.
    """
    network = _Network(stage, plan, one_queue)
    model = _stub_model(plan[stage], chain)
    topology = SimpleNamespace(
        stage=stage,
        num_stages=len(plan),
        device=torch.device("cpu"),
        activation_group="activations",
        head_group="heads" if sum(bool(part.heads) for part in plan) > 1 else None,
        lm_head_owner=0,
    )

    launched: set[str] = set()

    def compute(kind: str) -> None:
        network.events.append(Event("compute"))
        if sync_at == kind or (sync_at == "first launch" and kind not in launched):
            network.events.append(Event("sync"))
        launched.add(kind)

    def forward(inputs: Tensor, _: Tensor | None) -> tuple[Tensor, None]:
        compute("forward")
        shape = (1, 1, HIDDEN)
        first = inputs if inputs.requires_grad else torch.zeros(shape, requires_grad=True)
        return (first * 1.0 if model.part.trunk_layers else inputs), None

    def backward(loss: Tensor) -> None:
        loss.backward()
        compute("backward")

    def heads(_: Any, output: Tensor, *__: Any, **___: Any) -> HeadsResult:
        compute("heads")
        return HeadsResult(torch.zeros(len(model.heads.numbers)), torch.zeros_like(output))

    def heads_forward(_: Any, output: Tensor, *__: Any) -> ChainInputs:
        compute("heads' forward")
        return ChainInputs([output], output.detach())

    with (
        mock.patch.object(links_module, "dist", network),
        mock.patch.object(runner_module, "dist", network),
        mock.patch.object(runner_module, "heads_backward", heads),
        mock.patch.object(runner_module, "chain_forward", heads_forward),
    ):
        stages = depths(plan, model.config)
        runner = StageRunner(
            model,
            MicroBatchEngine(forward, lambda _, __: None, backward),
            topology,  # type: ignore[arg-type]
            _links(stage, len(plan)),
            lambda count: micro_batch_order(stages[stage], num_depths(plan, model.config), count),
            chunk_tokens=1,
            sparse_first_gradient=False,
        )
        runner._has_run = not first_alone
        tokens = torch.zeros(1, 1, dtype=torch.int64)
        batches = [Batch(tokens, torch.zeros(HEADS, 1, 1, dtype=torch.int64))] * micro_batches
        for _ in range(steps):
            runner.run(batches, torch.ones(HEADS))
    return network.events


def _stub_model(part: ModelPart, chain: bool) -> Any:
    weights = LMHeadWeights(torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True))
    return SimpleNamespace(
        part=part,
        config=SimpleNamespace(hidden_size=HIDDEN, chain=chain, lm_head="shared"),
        heads=SimpleNamespace(numbers=tuple(part.heads), lm_head=lambda: weights),
    )


def _links(stage: int, stages: int) -> Any:
    """The real senders and receivers, on groups that are only names."""
    clock = IdleClock(torch.device("cpu"))
    kind: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
    found: Any = SimpleNamespace(clock=clock, activations_in=None, activations_out=None)
    found.gradients_in = found.gradients_out = None
    forward: Any = "activations"
    backward: Any = "gradients"
    if stage > 0:
        found.activations_in = Receiver(forward, stage - 1, clock, "activations", **kind)
        found.gradients_out = Sender(backward, stage - 1, clock, "gradients")
    if stage < stages - 1:
        found.activations_out = Sender(forward, stage + 1, clock, "activations")
        found.gradients_in = Receiver(backward, stage + 1, clock, "gradients", **kind)
    found.finish_sends = lambda: [
        link.finish() for link in (found.activations_out, found.gradients_out) if link is not None
    ]
    return found


class _Device:
    """A stage's process and its GPU."""

    def __init__(self, events: list[Event]) -> None:
        self.events = events
        self.position = 0
        self.stream: list[Any] = []  # None: a computation; else the transfer that it waits for
        self.done = 0  # of the stream
        self.begun: dict[Any, int] = {}  # transfer: length of the stream before it
        self.queues: dict[Any, list[Any]] = {}

    def run_ahead(self, ended: set[Any], begun_by: dict[Any, list["_Device"]]) -> bool:
        """Let the process enqueue until it must wait for its device."""
        before = self.position
        while self.position < len(self.events):
            event = self.events[self.position]
            if event.kind == "sync" and not self._is_idle(ended):
                break
            if event.kind == "compute":
                self.stream.append(None)
            elif event.kind == "wait":
                self.stream.append(event.transfer)
            elif event.kind == "enqueue":
                self.begun[event.transfer] = len(self.stream)
                self.queues.setdefault(event.communicator, []).append(event.transfer)
                begun_by.setdefault(event.transfer, []).append(self)
            self.position += 1
        return self.position > before

    def compute(self, ended: set[Any]) -> bool:
        """Let the stream run as far as it can."""
        before = self.done
        while self.done < len(self.stream):
            awaited = self.stream[self.done]
            if awaited is not None and awaited not in ended:
                break
            self.done += 1
        return self.done > before

    def is_ready_for(self, transfer: Any, ended: set[Any]) -> bool:
        """Whether all that comes before a transfer on this device is done."""
        queue = next(queue for queue in self.queues.values() if transfer in queue)
        is_next = all(earlier in ended for earlier in queue[: queue.index(transfer)])
        return is_next and self.done >= self.begun[transfer]

    def _is_idle(self, ended: set[Any]) -> bool:
        return self.done == len(self.stream) and all(name in ended for name in self.begun)


def hangs(records: Sequence[list[Event]]) -> bool:
    """Whether the stages with these records would wait for each other without end."""
    devices = [_Device(events) for events in records]
    parties = {e.transfer: e.parties for events in records for e in events if e.kind == "enqueue"}
    begun_by: dict[Any, list[_Device]] = {}
    ended: set[Any] = set()
    moved = True
    while moved:
        moved = False
        for device in devices:
            moved |= device.run_ahead(ended, begun_by)
            moved |= device.compute(ended)
        for transfer, sides in begun_by.items():
            if transfer in ended or len(sides) < parties[transfer]:
                continue
            if all(side.is_ready_for(transfer, ended) for side in sides):
                ended.add(transfer)
                moved = True
    return any(device.position < len(device.events) for device in devices) or any(
        device.done < len(device.stream) for device in devices
    )
