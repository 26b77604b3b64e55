"""The progress line of a build on standard error: bars in a terminal, plain lines in a log."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0
BAR_COLUMNS = 20
# Below these widths of a terminal there is no room for all rates, or for any.
WIDE_COLUMNS = 160
NARROW_COLUMNS = 72


class ProgressLine:
    """Shows MB/s, tokens/s, the time left and the rejects of a build.

    Args:
        console: Where to write; a terminal gets a live bar, anything else a line now and then.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.fields[verb]}"),
            BarColumn(BAR_COLUMNS),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[rates]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._total_bytes = self._bytes = self._tokens = self._rejects = self._text_bytes = 0
        self._started_s = self._printed_s = 0.0
        self._verb = ""

    def say(self, message: str) -> None:
        """Print a step of the build."""
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)

    def start(self, verb: str, total_bytes: int, units: int) -> None:
        """A phase starts; the one before it is done."""
        self.close()
        self._verb, self._total_bytes = verb, total_bytes
        self._bytes = self._tokens = self._rejects = self._text_bytes = 0
        self._started_s = self._printed_s = time.monotonic()
        self.say(f"{verb}: {total_bytes / 1e6:,.1f} MB in {units:,} units")
        if self._console.is_terminal:
            self._bar.start()
            self._task = self._bar.add_task(
                "", total=max(total_bytes, 1), rates="", verb=self._verb
            )

    def finish(self, input_bytes: int, tokens: int, rejects: int) -> None:
        """More is on disk."""
        self._bytes += input_bytes
        self._tokens += tokens
        self._rejects += rejects
        if self._task is not None:
            self._bar.update(self._task, completed=self._bytes, rates=self._live_rates())
        elif time.monotonic() - self._printed_s >= SECONDS_BETWEEN_LINES:
            self._printed_s = time.monotonic()
            share = self._bytes / max(self._total_bytes, 1)
            left_s = self._elapsed_s() * (1 / share - 1) if share else 0.0
            self.say(f"{self._verb} {100 * share:3.0f} % {self._rates()}, {_clock(left_s)} left")

    def reading(self, text_bytes: int) -> None:
        """So much text was read so far, maybe in units that are not finished."""
        self._text_bytes = text_bytes
        if self._task is not None:
            self._bar.update(self._task, rates=self._live_rates())
        elif time.monotonic() - self._printed_s >= SECONDS_BETWEEN_LINES:
            self._printed_s = time.monotonic()
            self.say(
                f"{self._verb}: {text_bytes / 1e6:,.1f} MB of text read, {self._bytes / 1e6:,.1f} "
                f"of {self._total_bytes / 1e6:,.1f} MB of input done"
            )

    def skip(self, input_bytes: int) -> None:
        """Others did that much."""
        self._total_bytes -= input_bytes
        if self._task is not None:
            self._bar.update(self._task, total=max(self._total_bytes, 1))

    def close(self) -> None:
        """Leave the terminal clean and print the rates of what was done."""
        if self._task is not None:
            self._bar.stop()
            self._bar.remove_task(self._task)
            self._task = None
        if self._bytes:
            self.say(f"{self._verb}: {self._rates()} in {self._elapsed_s():.1f} s")
            self._bytes = 0

    def _elapsed_s(self) -> float:
        return max(time.monotonic() - self._started_s, 1e-9)

    def _live_rates(self) -> str:
        """What a terminal of this width has room for beside the bar."""
        width = self._console.width
        if width < NARROW_COLUMNS:
            return ""
        if width < WIDE_COLUMNS:
            return f"{self._text_bytes / 1e6:,.1f} MB of text"
        return f"{self._text_bytes / 1e6:,.1f} MB of text, {self._rates()}"

    def _rates(self) -> str:
        elapsed_s = self._elapsed_s()
        rates = f"{self._bytes / 1e6:,.1f} MB at {self._bytes / 1e6 / elapsed_s:,.1f} MB/s"
        if not self._tokens:
            return rates
        return (
            f"{rates}, {self._tokens:,} tokens at {self._tokens / elapsed_s:,.0f} tokens/s, "
            f"{self._rejects:,} rejects"
        )


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds. Example: 3661 is 1:01:01."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
