"""Processes of `benchmarks/gpu.sh`: each ends in time, with all that it started.

What holds a GPU disturbs the next measurement. A process that measures therefore leads a session of
its own, which is killed as a whole, and dies with the one that started it, however that ends.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from benchmarks.gpu_points import Point

ROOT = Path(__file__).resolve().parent.parent
Found = dict[str, Any]

POINT_S = 150.0  # that a point may take
_HELD_S = 5.0  # for the last output of a command that was killed
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class Called(NamedTuple):
    """How a command ended: its exit code, None past the limit, and what it wrote where."""

    code: int | None
    output: str
    errors: str


def call(command: Sequence[str], limit_s: float, **variables: str) -> Called:
    """Run a command; it ends with all that it started, past the limit by force."""
    places = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    variables["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, places))  # it runs elsewhere
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
        preexec_fn=die_with_parent,
    ) as process:
        try:
            output, errors = process.communicate(timeout=max(limit_s, 1))
            return Called(process.returncode, output, errors)
        except subprocess.TimeoutExpired:
            end_session(process.pid)
            try:
                return Called(None, *process.communicate(timeout=_HELD_S))
            except subprocess.TimeoutExpired as held:  # by a process in a session of its own
                return Called(None, _text(held.output), _text(held.stderr))
        finally:
            end_session(process.pid)


def end_on_signals() -> None:
    """Have SIGTERM and SIGHUP end this process as Ctrl-C does: with all that it has started."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)


def _end(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def end_session(leader: int) -> None:
    """Kill what is left of the processes that a session's leader has started, and itself."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _text(said: bytes | str | None) -> str:
    return said.decode("utf-8", "replace") if isinstance(said, bytes) else said or ""


class Waiting:
    """A fresh process that has imported what it needs, and measures one point when it is told.

    It waits while the one before it measures: what an import takes, which leaves the device alone,
    passes beside it.

    Args:
        device: what it will measure.
    """

    def __init__(self, device: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_child, args=(theirs, device), daemon=True)
        self._process.start()
        theirs.close()

    def measure(self, point: Point, trace: bool, left_s: float) -> Found | None:
        """What it measures, then it ends; the error, when it fails; None when no time was left."""
        try:
            self._pipe.send((point, trace))
            if self._pipe.poll(min(left_s, POINT_S)):
                answer: Found = self._pipe.recv()
                return answer
            return vars(point) | {"error": "took too long"} if left_s > POINT_S else None
        except (EOFError, OSError):
            self._process.join(_HELD_S)
            code = self._process.exitcode
            if code in (-signal.SIGTERM, -signal.SIGINT):
                return None  # a signal for all processes of the call, which is to end
            return vars(point) | {"error": f"its process {_ended(code)}"}
        finally:
            self.end()

    def end(self) -> None:
        """Without an answer."""
        assert self._process.pid is not None, "it was started"
        end_session(self._process.pid)
        self._process.kill()
        self._process.join(_HELD_S)  # a driver may hold it for longer


def _ended(code: int | None) -> str:
    if code is None or code >= 0:
        return f"ended (exit code {code})"
    return f"was ended by {signal.Signals(-code).name}"


def _child(pipe: Any, device: str) -> None:
    import logging
    import warnings

    die_with_parent()
    os.setsid()  # Ctrl-C is for the one that started this; `Waiting.end` kills the session
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    from benchmarks.gpu_points import measure, prepare

    with contextlib.suppress(Exception):  # what fails here fails again in `measure`
        prepare(device)
    try:
        point, trace = pipe.recv()
    except EOFError:
        return
    try:
        pipe.send(measure(point, device, trace))
    except BaseException as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        pipe.send(vars(point) | {"error": f"{type(error).__name__}: {first_line}"[:300]})
