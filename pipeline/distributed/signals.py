"""Stopping on a signal, at the same step on all ranks."""

import signal
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
EXIT_STOPPED = 75  # EX_TEMPFAIL: a signal ended the run early; start it again and it goes on


class StopRequest:
    """Remembers a signal, and lets all ranks agree that one of them got it.

    Launchers repeat themselves (`scancel` and `srun` may each send SIGTERM), so a repeated signal
    changes nothing; only a second Ctrl-C ends the process at once.

    Args:
        device: where the ranks' collectives run.
    """

    def __init__(self, device: torch.device) -> None:
        self._received = 0
        self._device = device
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, _: FrameType | None) -> None:
        self._received = number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    def agreed(self) -> str | None:
        """Collective: the name of a signal that any rank received, or None; one answer for all."""
        number = torch.tensor(self._received, dtype=torch.int32, device=self._device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return signal.Signals(int(number)).name if int(number) else None
