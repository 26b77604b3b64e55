"""An optimizer step's micro-batches through one pipeline stage, in 1F1B order.

A stage of the trunk runs its layers forward, sends what they give to the next stage, and later
takes the gradient that comes back through them. The stages with heads hand the trunk's output on
down their chain; on the way back each adds the gradient of its own heads, head by head, so that
the trunk receives one gradient.

The heads' forward and backward both happen in a micro-batch's backward turn: until then a stage of
heads keeps nothing but z.

Heads that read one another (`model.structure.head_kinds`) are links of that chain like the trunk's
stages: a stage runs its own forward, keeping what each reads, sends what the last one gave to the
next, and takes the gradient with respect to it before their turns in the backward.

Legend: B batch, S sequence, H hidden, n heads.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from data_prep.loading.loader import Batch
from model.backward import (
    ChainInputs,
    LMHeadGradients,
    chain_forward,
    deliver,
    heads_backward,
)
from model.language_model import MultiTokenModel
from model.lm_head import LMHeadWeights
from pipeline.distributed.topology import Topology
from pipeline.stages.links import Receiver, StageLinks

# (is forward, micro-batch) in the order in which a stage does them, for so many micro-batches.
Order = Callable[[int], Iterable[tuple[bool, int]]]


class MicroBatchEngine(NamedTuple):
    """What the runner needs of the engine.

    Attributes:
        forward: runs the stage's part of the trunk on tokens or activations; gives its output and
            whatever `begin_backward` takes back.
        begin_backward: told what forward gave, and whether the micro-batch is the step's last,
            before any of its gradients arise.
        backward: takes the scalar that carries the gradients that are still to be delivered.
    """

    forward: Callable[[Tensor, Tensor | None], tuple[Tensor, Any]]
    begin_backward: Callable[[Any, bool], None]
    backward: Callable[[Tensor], None]


class _InFlight(NamedTuple):
    """A micro-batch between its forward and its backward.

    Attributes:
        received: what came from the stage before, a leaf; None in the first stage.
        output: what this stage's trunk layers gave, with its graph.
        token: what the engine gave with it.
        chain: of heads that read one another, what their forward left; else None.
    """

    received: Tensor | None
    output: Tensor
    token: Any
    chain: ChainInputs | None


class StageRunner:
    """Runs the micro-batches of a step through this rank's stage.

    Args:
        model: this stage's part of the model.
        engine: forward and backward of the trunk layers.
        topology: the grid of ranks.
        order: the stage's schedule.
        chunk_tokens: tokens whose logits exist at once.
        sparse_first_gradient: give the LM head a gradient of zeros in a step's first micro-batch,
            for an optimizer that overwrites its buffers then and adds to them afterwards.

    Attributes:
        own_s: seconds of the steps of the last `idle_fractions` in which this rank did not wait.
    """

    def __init__(
        self,
        model: MultiTokenModel,
        engine: MicroBatchEngine,
        topology: Topology,
        links: StageLinks,
        order: Order,
        *,
        chunk_tokens: int,
        sparse_first_gradient: bool,
    ) -> None:
        self._model = model
        self._engine = engine
        self._topology = topology
        self._links = links
        self._order = order
        self._chunk_tokens = chunk_tokens
        self._sparse_first_gradient = sparse_first_gradient
        self._has_run = False
        self.own_s = 0.0

    def run(
        self,
        batches: Sequence[Batch],
        scales: Tensor,
        sequence_losses: Tensor | None = None,
    ) -> Tensor:
        """Forward and backward of all micro-batches of a step.

        Args:
            batches: the micro-batches; every stage of a chain has the same ones.
            scales: `[n]`, factor on each head's loss sum.
            sequence_losses: `[micro-batches, B]` float64, filled with head 1's loss sum of each
                sequence in the stage of head 1; or None.

        Returns:
            `[n]` float32, sum of each head's token losses over the chain's micro-batches.
        """
        with self._links.clock.step():
            sums = self._run(batches, scales, sequence_losses)
            self._links.finish_sends()
            work = dist.all_reduce(sums, group=self._topology.activation_group, async_op=True)
            self._links.clock.wait(work, "the other stages at the end of a step")
        return sums

    def _run(
        self, batches: Sequence[Batch], scales: Tensor, sequence_losses: Tensor | None
    ) -> Tensor:
        """This stage's part of `run`: the losses of its own heads."""
        is_first_step, self._has_run = not self._has_run, True
        self._expect(batches, ahead=not is_first_step)
        sums = torch.zeros_like(scales)
        gradients: LMHeadGradients | None = None
        in_flight: dict[int, _InFlight] = {}
        for is_forward, micro in self._turns(len(batches), first_alone=is_first_step):
            if is_forward:
                in_flight[micro] = self._forward(batches[micro])
                continue
            losses = None if sequence_losses is None else sequence_losses[micro]
            gradients = self._backward(
                in_flight.pop(micro), batches, micro, scales, sums, gradients, losses
            )
            if is_first_step and micro == 0:
                for receiver in self._receivers():
                    receiver.look_ahead()
        return sums

    def _turns(self, micro_batches: int, *, first_alone: bool) -> list[tuple[bool, int]]:
        """The order of a step; in a run's first one the first micro-batch passes alone.

        What a kernel needs at its first launch (being loaded, or made by cuDNN or torch.compile)
        may wait for the whole GPU, so no receive may be posted ahead until all have been launched.
        """
        if not first_alone:
            return list(self._order(micro_batches))
        others = self._order(micro_batches - 1)
        return [(True, 0), (False, 0), *((forward, micro + 1) for forward, micro in others)]

    def idle_fractions(self) -> list[float]:
        """Share of the steps since the last call that each stage waited; a collective."""
        seconds = torch.zeros(2, self._topology.num_stages, dtype=torch.float64)
        waited_s, elapsed_s = self._links.clock.take()
        self.own_s = elapsed_s - waited_s
        seconds[:, self._topology.stage] = torch.tensor([waited_s, elapsed_s])
        seconds = seconds.to(self._topology.device)
        dist.all_reduce(seconds)
        idle, elapsed = seconds
        return (idle / elapsed.clamp(min=1e-9)).tolist()

    def _expect(self, batches: Sequence[Batch], *, ahead: bool) -> None:
        shapes = [activation_shape(batch, self._model) for batch in batches]
        for receiver in self._receivers():
            receiver.expect(shapes, ahead=ahead)

    def _receivers(self) -> list[Receiver]:
        both = (self._links.activations_in, self._links.gradients_in)
        return [receiver for receiver in both if receiver is not None]

    def _forward(self, batch: Batch) -> _InFlight:
        received = None
        inputs = batch.tokens
        if self._links.activations_in is not None:
            received = inputs = self._links.activations_in.receive().requires_grad_()
        send = self._links.activations_out.send if self._links.activations_out else None
        in_chain = self._model.config.chain and bool(self._model.heads.numbers)
        if send is not None and not self._model.part.trunk_layers and not in_chain:
            send(inputs)  # before anything else: others wait for it
        output, token = self._engine.forward(inputs, batch.documents)
        if send is not None and self._model.part.trunk_layers and not in_chain:
            send(output)
        chain = None
        if in_chain:
            chain = chain_forward(self._model, output, batch.documents)
            if send is not None:
                send(chain.output)
        return _InFlight(received, output, token, chain)

    def _backward(
        self,
        flight: _InFlight,
        batches: Sequence[Batch],
        micro: int,
        scales: Tensor,
        sums: Tensor,
        gradients: LMHeadGradients | None,
        sequence_losses: Tensor | None,
    ) -> LMHeadGradients | None:
        """Heads, then what comes from below, then this stage's trunk layers.

        Returns:
            The LM head's gradients so far; None in a stage without heads.
        """
        is_last = micro == len(batches) - 1
        self._engine.begin_backward(flight.token, is_last)
        wanted: Tensor | None = None
        shared: LMHeadWeights | None = None
        if flight.chain is not None and self._links.gradients_in is not None:
            wanted = self._links.gradients_in.receive()
        if self._model.heads.numbers:
            shared = self._model.heads.lm_head()
            gradients = LMHeadGradients.zeros(shared) if gradients is None else gradients
            result = heads_backward(
                self._model,
                flight.output,
                batches[micro].labels,
                scales,
                shared=shared,
                gradients=gradients,
                chunk_tokens=self._chunk_tokens,
                documents=batches[micro].documents,
                chain=flight.chain,
                output_gradient=wanted,
                sequence_losses=sequence_losses,
            )
            wanted = result.trunk_gradient
            for head, loss_sum in zip(self._model.heads.numbers, result.loss_sums, strict=True):
                sums[head - 1] += loss_sum
        if flight.chain is None and self._links.gradients_in is not None:
            below = self._links.gradients_in.receive()
            wanted = below if wanted is None else wanted.add_(below)
        pairs: list[tuple[Tensor, Tensor | None]] = []
        if self._model.part.trunk_layers:
            pairs.append((flight.output, wanted))
        elif self._links.gradients_out is not None and wanted is not None:
            self._links.gradients_out.send(wanted)
        if shared is not None and gradients is not None:
            pairs += self._lm_head_pairs(shared, gradients, micro, is_last)
        self._engine.backward(deliver(pairs or [(flight.output.detach(), None)]))
        if self._model.part.trunk_layers and self._links.gradients_out is not None:
            assert flight.received is not None
            assert flight.received.grad is not None
            self._links.gradients_out.send(flight.received.grad)
        return gradients

    def _lm_head_pairs(
        self, shared: LMHeadWeights, gradients: LMHeadGradients, micro: int, is_last: bool
    ) -> list[tuple[Tensor, Tensor | None]]:
        """The LM head's gradients when they are due: once a step, summed over the head stages."""
        if is_last:
            self._sum_over_head_stages(gradients)
        if not self._model.part.owns_lm_head:
            return []
        if is_last:
            return gradients.pairs(shared)
        if micro == 0 and self._sparse_first_gradient:
            return [(weight, None) for weight in shared]
        return []

    def _sum_over_head_stages(self, gradients: LMHeadGradients) -> None:
        """Into the stage that trains the LM head."""
        group = self._topology.head_group
        if group is None:
            return
        replicated = self._model.config.lm_head == "replicated"
        for gradient in (gradients.norm,) if replicated else gradients:
            work = dist.reduce(gradient, self._topology.lm_head_owner, group=group, async_op=True)
            self._links.clock.wait(work, "the LM head's gradients of the other stages with heads")


def activation_shape(batch: Batch, model: MultiTokenModel) -> tuple[int, int, int]:
    """`(S, B, H)` of what stages send each other for a batch."""
    size, length = batch.tokens.shape
    return length, size, model.config.hidden_size
