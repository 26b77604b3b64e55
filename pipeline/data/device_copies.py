"""A step's batches on the GPU before the step begins: copied while the step before it computes.

A copy from ordinary memory makes the host wait, and the GPU with it. From pinned memory, on a
stream of its own, it runs beside the computing; the step's stream waits only for its end.
"""

from collections.abc import Generator, Iterator
from contextlib import closing
from typing import NamedTuple

import torch
from torch import Tensor

from data_prep.loading.loader import Batch
from pipeline.data.batch_order import StepBatches


class _Copied(NamedTuple):
    """Batches on the device, and what says that they have arrived.

    Attributes:
        batches: usable once `arrived` is.
        arrived: recorded after the last copy.
        sources: the pinned originals, which must live until then.
    """

    batches: StepBatches
    arrived: torch.cuda.Event
    sources: StepBatches


def batches_on(
    device: torch.device, steps: Generator[StepBatches, None, None]
) -> Generator[StepBatches, None, None]:
    """The same steps, on a GPU one copied ahead; on a CPU as they are.

    Args:
        device: where the model runs.
        steps: closed with what is returned.
    """
    with closing(steps):
        if device.type == "cuda":
            yield from _one_ahead(_Copier(device), steps)
        else:
            yield from steps


class _Copier:
    """Copies on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def begin(self, step: StepBatches) -> _Copied:
        """Start the copies of a step's batches."""
        sources = step._replace(micro_batches=[_pinned(batch) for batch in step.micro_batches])
        with torch.cuda.stream(self._stream):
            copies = [batch.to(self._device) for batch in sources.micro_batches]
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        return _Copied(step._replace(micro_batches=copies), arrived, sources)

    def finish(self, copied: _Copied) -> StepBatches:
        """Let the current stream wait for the copies; the host does not."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(copied.arrived)
        for batch in copied.batches.micro_batches:
            for tensor in batch:
                if tensor is not None:
                    # Its memory was taken on the other stream, which must not give it away early.
                    tensor.record_stream(stream)
        return copied.batches


def _one_ahead(copier: _Copier, steps: Iterator[StepBatches]) -> Iterator[StepBatches]:
    """Begin a step's copies before the step before it is handed out."""
    waiting: _Copied | None = None
    for step in steps:
        following = copier.begin(step)
        if waiting is not None:
            yield copier.finish(waiting)
        waiting = following
    if waiting is not None:
        yield copier.finish(waiting)


def _pinned(batch: Batch) -> Batch:
    def pin(tensor: Tensor) -> Tensor:
        return tensor.pin_memory()

    documents = None if batch.documents is None else pin(batch.documents)
    return Batch(pin(batch.tokens), pin(batch.labels), documents)
