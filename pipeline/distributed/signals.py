"""Signals that ask a run to stop; all ranks agree on it once per step, and stop together."""

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
EXIT_STOPPED = 75  # EX_TEMPFAIL: a signal ended the run early; start it again and it goes on


class StopRequest:
    """Remembers a signal that this process received.

    Launchers repeat themselves (`scancel` and `srun` may each send SIGTERM), so a repeated signal
    changes nothing; only a second Ctrl-C ends the process at once.

    Attributes:
        received: number of the last signal; 0 for none.
    """

    def __init__(self) -> None:
        self.received = 0

    def listen(self) -> None:
        """Take over the signals, in the main thread."""
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.received = number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
