"""Two pipeline stages on one GPU: the staged engine's streams and transfers.

NCCL refuses two ranks on one GPU, so they talk by gloo, which sends from the host's memory: what
the links send is copied there and back.
"""

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.device_engine import computed_on_cpu, device_config
from tests.support.parity_runs import relative_difference

STAGES = [{"trunk": "0-2"}, {"heads": "1-3"}]


class _ThroughTheHost:
    """Stands for `torch.distributed` in the links: transfers of tensors of a GPU over gloo."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def isend(self, tensor: torch.Tensor, peer: int, group: Any) -> Any:
        """Send a copy."""
        return _Kept(self._real.isend(tensor.cpu(), peer, group=group))

    def irecv(self, tensor: torch.Tensor, peer: int, group: Any) -> Any:
        """Receive into a copy, which becomes the tensor when it is waited for."""
        host = torch.empty_like(tensor, device="cpu")
        return _Kept(self._real.irecv(host, peer, group=group), tensor, host)


class _Kept:
    """A transfer and the memory that it needs."""

    def __init__(self, work: Any, target: Any = None, host: Any = None) -> None:
        self._work, self._target, self._host = work, target, host

    def wait(self) -> None:
        """Until it has ended, and its tensor is there."""
        self._work.wait()
        if self._target is not None:
            self._target.copy_(self._host)


def _rank(rank: int, folder: str, device_type: str, zero: int, precision: Any, pipe: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0")
    if device_type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import torch.distributed as dist

    from pipeline.distributed.rendezvous import RankInfo
    from pipeline.distributed.topology import Topology
    from pipeline.engine.build import build_engine
    from pipeline.stages import links
    from tests.support.device_engine import take_steps

    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    links.dist = _ThroughTheHost(dist)  # type: ignore[assignment, attr-defined]
    device = torch.device("cuda", 0) if device_type == "cuda" else torch.device("cpu")
    config = device_config(parallel={"stages": STAGES, "zero": zero})
    topology = Topology(RankInfo(rank, 0, 2), 1, device, plan=config.stage_plan)
    engine = build_engine(config, topology, precision)
    steps = take_steps(engine, 3)
    gradients = {name: gradient.numpy() for name, gradient in steps[0].gradients.items()}
    pipe.send((steps[0].head_losses.tolist(), steps[0].grad_norm, gradients))  # no shared memory


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_two_stages_on_one_gpu(device: torch.device, tmp_path: Path, zero: int) -> None:
    """The first step is the CPU's, over all gradients; three steps end."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    ranks = [
        context.Process(target=_rank, args=(rank, str(tmp_path), device.type, zero, "fp32", sender))
        for rank, (_, sender) in enumerate(pipes)
    ]
    for process, (_, sender) in zip(ranks, pipes, strict=True):
        process.start()
        sender.close()
    try:
        assert all(receiver.poll(240) for receiver, _ in pipes)
        found = [receiver.recv() for receiver, _ in pipes]
    finally:
        for process in ranks:
            process.kill()
            process.join()
    wanted = computed_on_cpu(device_config())
    gradients = found[0][2] | found[1][2]
    assert relative_difference(found[0][0], wanted.head_losses) < 2e-5
    assert found[0][1] == pytest.approx(wanted.grad_norm, rel=2e-5)
    assert gradients.keys() == wanted.gradients.keys()
    for name, gradient in wanted.gradients.items():
        assert relative_difference(gradients[name], gradient) < 2e-5, name
