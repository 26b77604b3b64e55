"""metrics.jsonl: one flushed line per record, exact after a resume; and its writers."""

import fcntl
import io
import logging
import os
import pty
import select
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

from model.errors import ConfigError
from pipeline.config.run_config import RunConfig, load_config
from pipeline.reporting.hardware import peak_flops
from pipeline.reporting.metrics import METRICS_NAME, MetricsLog, Value, cut_after, read_metrics
from pipeline.reporting.metrics_writers import TensorBoardWriter, open_metrics_log
from pipeline.reporting.progress import ProgressLine, clock

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"


class Memory:
    """A writer that keeps what it is given."""

    def __init__(self) -> None:
        self.records: list[dict[str, Value]] = []
        self.closed = False

    def write(self, record: Mapping[str, Value]) -> None:
        """Keep one record."""
        self.records.append(dict(record))

    def close(self) -> None:
        """Remember that it was closed."""
        self.closed = True


def fill(run_dir: Path, steps: range, resumed_step: int) -> None:
    """Write one record per step and close."""
    log = MetricsLog(run_dir, resumed_step=resumed_step)
    for step in steps:
        log.write({"step": step, "loss": 1 / step})
    log.close()


def test_a_record_is_on_disk_when_write_returns(tmp_path: Path) -> None:
    """The line can be read while the log is still open, with every digit of its numbers."""
    log = MetricsLog(tmp_path / "run", resumed_step=0)
    log.write({"step": 1, "loss": 1 / 3, "skipped": True})
    assert read_metrics(tmp_path / "run") == [{"step": 1, "loss": 1 / 3, "skipped": True}]
    log.close()


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    """The file stays JSON that every reader takes."""
    log = MetricsLog(tmp_path, resumed_step=0)
    log.write({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    log.close()
    text = (tmp_path / METRICS_NAME).read_text()
    assert text == '{"step": 1, "loss": null, "grad_norm": null}\n'


@pytest.mark.parametrize("torn", [b"", b'{"step": 9, "lo', b"\x00\x00\x00", b'{"step": 5}'])
def test_resumed_file_equals_that_of_an_uninterrupted_run(tmp_path: Path, torn: bytes) -> None:
    """Lines past the resumed step and a torn last line go; the rest stays byte for byte."""
    fill(tmp_path / "straight", range(1, 11), resumed_step=0)
    fill(tmp_path / "killed", range(1, 9), resumed_step=0)
    with (tmp_path / "killed" / METRICS_NAME).open("ab") as file:
        file.write(torn)
    fill(tmp_path / "killed", range(6, 9), resumed_step=5)
    fill(tmp_path / "killed", range(8, 11), resumed_step=7)
    straight = (tmp_path / "straight" / METRICS_NAME).read_bytes()
    assert (tmp_path / "killed" / METRICS_NAME).read_bytes() == straight
    assert [path.name for path in (tmp_path / "killed").iterdir()] == [METRICS_NAME]


def test_a_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    """Records of an earlier run in the same folder do not mix with the new one."""
    fill(tmp_path, range(1, 5), resumed_step=0)
    fill(tmp_path, range(1, 3), resumed_step=0)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_reading_leaves_out_a_torn_line_and_names_a_broken_one(tmp_path: Path) -> None:
    """A last line without its end is not yet a record; a broken line inside is an error."""
    path = tmp_path / METRICS_NAME
    path.write_text('{"step": 1}\n{"step": 2')
    assert read_metrics(path) == [{"step": 1}]
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ConfigError, match="line 2 is not a record"):
        read_metrics(path)
    with pytest.raises(ConfigError, match="does not exist"):
        read_metrics(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 1, "loss": NaN}',
        '{"step": 1, "loss": 1e999}',
        '{"step": 1' + "0" * 400 + "}",
        '{"step": -1}',
        '{"step": true}',
        '{"step": 1, "loss": "text"}',
        '{"step": 1, "loss": {"a": 1}}',
        '{"step": 1, "loss": [[1]]}',
        '{"step": 1, "\\u001b[2J": 1}',
        '{"step": 1, "' + "x" * 300 + '": 1}',
        '{"step": 1, "a": ' + "[" * 5000 + "]" * 5000 + "}",
        '{"step": 1, "a": [' + "1, " * 500_000 + "1]}",
    ],
)
def test_what_no_run_writes_is_no_record(tmp_path: Path, line: str) -> None:
    """Values that are no numbers, names that cannot be shown, and lines of a megabyte."""
    path = tmp_path / METRICS_NAME
    path.write_text('{"step": 1}\n' + line + '\n{"step": 2}\n')
    with pytest.raises(ConfigError, match="line 2 is not a record"):
        read_metrics(path)
    assert cut_after(path, 1) >= 2
    assert path.read_text() == '{"step": 1}\n'


def test_writers_get_what_the_file_got(tmp_path: Path) -> None:
    """Writers are handed each record after it was written, and are closed with the log."""
    memory = Memory()
    log = MetricsLog(tmp_path, resumed_step=0, writers=[memory])
    log.write({"step": 1, "loss": float("nan")})
    log.close()
    log.write({"step": 2, "loss": 1.0})
    assert memory.records == read_metrics(tmp_path) == [{"step": 1, "loss": None}]
    assert memory.closed


def quickstart(run_dir: Path, *overrides: str) -> RunConfig:
    """The quickstart in another folder."""
    return load_config(QUICKSTART, [f"run.dir={run_dir}", *overrides])


def test_only_rank_zero_writes(tmp_path: Path) -> None:
    """Another rank's log takes records and leaves no file."""
    log = open_metrics_log(quickstart(tmp_path / "run"), rank=1, resumed_step=0)
    log.write({"step": 1})
    log.close()
    assert not (tmp_path / "run").exists()


def test_wandb_without_its_package_is_refused_on_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks fail alike and before anything is written."""
    monkeypatch.setitem(sys.modules, "wandb", None)  # as on a machine without it
    config = quickstart(tmp_path / "run", "log.wandb_project=headway")
    for rank in (0, 1):
        with pytest.raises(ConfigError, match=r'wandb_project="headway".*pip install wandb'):
            open_metrics_log(config, rank=rank, resumed_step=0)
    assert not (tmp_path / "run").exists()


def test_tensorboard_reads_the_records(tmp_path: Path) -> None:
    """Scalars carry the values and steps of the records; a resume supersedes later steps."""
    first = TensorBoardWriter(tmp_path, resumed_step=0)
    for step in (1, 2, 3):
        first.write({"step": step, "loss": float(step), "eval_loss_head_1": None})
    first.close()
    second = TensorBoardWriter(tmp_path, resumed_step=2)
    second.write({"step": 3, "loss": 30.0, "eval_loss_head_1": 0.5})
    second.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1), (2, 2), (3, 30)]
    assert [(e.step, e.value) for e in events.Scalars("eval/loss_head_1")] == [(3, 0.5)]


def test_progress_without_a_terminal_is_one_log_line_per_record(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The line has step, loss, speed and time left."""
    caplog.set_level(logging.INFO)
    line = ProgressLine(last_step=101, console=Console(file=io.StringIO()))
    line.write({"step": 1, "loss": 2.5, "tokens_per_s": 1234.5, "step_time_s": 36.0})
    line.write({"step": 2, "loss": None, "skipped": True})
    line.close()
    assert caplog.messages[0] == "step 1/101 | 1:00:00 left | loss 2.5000 | tokens/s 1,234"
    assert "SKIPPED" in caplog.messages[1]
    assert len(caplog.messages) == 2


def test_progress_on_a_terminal_is_drawn_live() -> None:
    """The drawn line shows the last record."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    line = ProgressLine(last_step=3, console=console)
    line.write({"step": 1, "loss": 2.5, "step_time_s": 1.0})
    line.write({"step": 3, "loss": 1.25, "step_time_s": 1.0})
    line.close()
    assert "3/3" in screen.getvalue()
    assert "loss 1.2500" in screen.getvalue()


RECORD = {
    **{"loss": 2.5, "loss_head_1": 2.4, "eval_loss_head_1": 2.2, "eval_tokens_per_forward": 2.1},
    **{"grad_norm": 1.0, "tokens_per_s": 123456.0, "mfu": 0.4, "step_time_s": 0.3},
}


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_narrow_terminal_cuts_only_the_figures(width: int) -> None:
    """Step and bar are whole at 80 columns and below; the line is never longer than the screen."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, color_system=None)
    line = ProgressLine(last_step=200_000, console=console)
    line.write({"step": 150_000, **RECORD})
    line.close()
    drawn = screen.getvalue().split("\n")[-2].split("\x1b[2K")[-1]
    assert drawn.startswith("step 150000/200000 ")
    assert "━━━━━━━━━━━━━━" in drawn
    assert len(drawn) <= width


PTY_CODE = """
import sys
from pipeline.reporting.progress import ProgressLine
line = ProgressLine(last_step=9)
for step in (1, 2):
    line.write({"step": step, "loss": 1.0, "loss_head_1": 1.0, "grad_norm": 1.0, "step_time_s": 1})
    print(f"logged {step}", flush=True)
    sys.stdin.readline()
line.close()
"""


def test_a_resized_terminal_keeps_no_copies() -> None:
    """On a terminal that shrank, all rows that the old line wraps to are erased, once."""
    own, other = pty.openpty()
    output = b""
    readable = select.poll()  # select() takes no descriptor past 1,023
    readable.register(own, select.POLLIN)

    def read_until(text: bytes) -> None:
        nonlocal output
        while text not in output:
            assert readable.poll(60_000), output
            output += os.read(own, 4096)

    fcntl.ioctl(own, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    variables = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    with subprocess.Popen(
        [sys.executable, "-c", PTY_CODE],
        stdin=other,
        stdout=other,
        stderr=other,
        env={**variables, "TERM": "xterm"},
    ) as process:
        try:
            read_until(b"logged 1")
            erase_above = b"\x1b[1A\x1b[2K"
            assert erase_above not in output
            fcntl.ioctl(own, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 30, 0, 0))
            os.write(own, b"\n")
            read_until(b"logged 2")
            assert output.count(erase_above * 2) == 1  # 80 columns are three rows of 30
            os.write(own, b"\n")
            assert process.wait(60) == 0
        finally:
            process.kill()  # it waits for a line that a failed test does not send
    os.close(own)
    os.close(other)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00:00"), (3725, "1:02:05"), (90_061, "1 d 1:01:01")]
)
def test_clock(seconds: float, text: str) -> None:
    """Times read as hours, minutes, seconds."""
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10", 125e12),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("Some other device", None),
    ],
)
def test_peak_flops_by_device_name(name: str, flops: float | None) -> None:
    """Names as drivers report them find their peak; an unknown device has none."""
    assert peak_flops(name) == flops


@pytest.mark.parametrize("gone", ["file", "folder"])
def test_a_deleted_file_is_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, gone: str
) -> None:
    """Deleted during the run, alone or with the run's folder: no line is lost, and it is said."""
    run_dir = tmp_path / "run"
    log = MetricsLog(run_dir, resumed_step=0, strict=True)
    for step in range(1, 6):
        log.write({"step": step, "loss": 1 / step})
        if step == 3:
            (run_dir / METRICS_NAME).unlink()
            if gone == "folder":
                run_dir.rmdir()
        log.sync()
    log.close()
    assert [record["step"] for record in read_metrics(run_dir)] == [1, 2, 3, 4, 5]
    assert "was deleted while the run went on; its 3 lines are written again" in caplog.text
    assert ("with its checkpoints" in caplog.text) == (gone == "folder")


def test_a_file_that_was_cut_or_replaced_is_noticed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What cannot be had back is said, and fails a strict log's sync; other files stay."""
    path = tmp_path / METRICS_NAME
    for strict in (False, True):
        path.unlink(missing_ok=True)
        log = MetricsLog(tmp_path, resumed_step=0, strict=strict)
        log.write({"step": 1})
        path.rename(tmp_path / "elsewhere")
        path.write_text('{"step": 1, "edited": 1}\n')
        log.write({"step": 2})
        assert "was replaced by another file" in caplog.text
        assert [record["step"] for record in read_metrics(path)] == [1, 2]
        log.sync()
        path.write_text("")
        log.write({"step": 3})
        assert "lines of earlier steps are lost" in caplog.text
        assert [record["step"] for record in read_metrics(path)] == [3]
        if strict:
            with pytest.raises(OSError, match="lines of earlier steps are lost"):
                log.sync()
        else:
            log.sync()
        log.close()
