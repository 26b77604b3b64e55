"""How far a run is: a live line on a terminal, plain log lines elsewhere."""

import logging
import time
from collections.abc import Mapping

from rich.console import Console, ConsoleRenderable, RenderHook
from rich.control import Control
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.segment import ControlType
from rich.table import Column

from pipeline.reporting.metrics import Value

logger = logging.getLogger(__name__)

_SMOOTHING = 0.1


class ProgressLine:
    """Shows step, loss, speed and time left from the records of a run.

    Args:
        last_step: Step at which this run stops.
        resumed_step: Last step done before this start.
        console: Where to draw; stdout unless given.
    """

    def __init__(
        self, *, last_step: int, resumed_step: int = 0, console: Console | None = None
    ) -> None:
        self._console = console or Console()
        self._last_step = last_step
        self._seen_step = resumed_step
        self._seen_time_s: float | None = None
        self._step_time_s: float | None = None
        self._progress: Progress | None = None
        self._resizing = _Resizing(self._console)
        self._task: TaskID | None = None

    def write(self, record: Mapping[str, Value]) -> None:
        """Show one record."""
        step = int(record["step"] or 0)
        self._time_step(step, record.get("step_time_s"))
        remaining_s = (self._last_step - step) * (self._step_time_s or 0.0)
        text = f"{clock(remaining_s)} left | {_figures(record)}"
        if self._console.is_terminal:
            self._draw(step, text)
        else:
            logger.info("step %d/%d | %s", step, self._last_step, text)

    def close(self) -> None:
        """Leave the last state of the live line on the screen."""
        if self._progress is not None:
            self._progress.stop()
            self._console.pop_render_hook()
            self._progress = None

    def _time_step(self, step: int, step_time_s: Value) -> None:
        """Smooth the seconds per step, pauses for validation and checkpoints included."""
        now_s = time.monotonic()
        if self._seen_time_s is not None and step > self._seen_step:
            latest = (now_s - self._seen_time_s) / (step - self._seen_step)
        else:
            latest = float(step_time_s or 0.0)
        if self._step_time_s is None:
            self._step_time_s = latest
        else:
            self._step_time_s += _SMOOTHING * (latest - self._step_time_s)
        self._seen_step, self._seen_time_s = step, now_s

    def _draw(self, step: int, text: str) -> None:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("step", table_column=Column(no_wrap=True)),
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                BarColumn(bar_width=20, table_column=Column(no_wrap=True)),
                TextColumn(  # all that is left of the line, so that it alone is cut
                    "{task.description}",
                    table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
                ),
                console=self._console,
                expand=True,
            )
            self._console.push_render_hook(self._resizing)  # below the live line's own
            self._task = self._progress.add_task("", total=self._last_step)
            self._progress.start()
        assert self._task is not None, "the live line has no task"
        self._progress.update(self._task, completed=step, description=text)


class _Resizing(RenderHook):
    """Erases all of a live line that a narrower terminal has wrapped.

    The line is one row when it is drawn, and only that row is erased before the next drawing. Where
    the terminal became narrower meanwhile, the rest of the line would stay above it.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._width = console.width

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Put before the next output what erases the rows above its own."""
        before, self._width = self._width, self._console.width
        rows_above = -(-before // max(self._width, 1)) - 1
        if rows_above <= 0:
            return renderables
        erase = ((ControlType.CURSOR_UP, 1), (ControlType.ERASE_IN_LINE, 2))
        return [Control(*erase * rows_above), *renderables]


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, with days in front where there are any."""
    whole = max(round(seconds), 0)
    days, rest = divmod(whole, 86_400)
    text = f"{rest // 3600}:{rest % 3600 // 60:02}:{rest % 60:02}"
    return f"{days} d {text}" if days else text


def _figures(record: Mapping[str, Value]) -> str:
    """The values of a record that a person watches."""
    parts = []
    for key, label, form in (
        ("loss", "loss", ".4f"),
        ("loss_head_1", "head 1", ".4f"),
        ("eval_loss_head_1", "eval head 1", ".4f"),
        ("eval_tokens_per_forward", "tokens/forward", ".2f"),
        ("grad_norm", "grad norm", ".3f"),
        ("tokens_per_s", "tokens/s", ",.0f"),
        ("mfu", "mfu", ".1%"),
    ):
        value = record.get(key)
        if value is not None:
            parts.append(f"{label} {value:{form}}")
    if record.get("skipped"):
        parts.append("SKIPPED (gradients not finite)")
    return " | ".join(parts)
