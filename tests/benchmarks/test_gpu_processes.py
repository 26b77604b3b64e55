"""Processes of `benchmarks/gpu.sh` end in time, with all that they started, however they end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.gpu_points import Point
from benchmarks.gpu_processes import Waiting, call

ROOT = Path(__file__).parents[2]
SLOW_S = 60.0  # for a busy machine to do what takes it a moment
POINT = Point("tiny", micro=1)

# Starts a child, and one in a session of its own that keeps its output open; then sleeps.
PARENT = """
import subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(90)"]
child = subprocess.Popen(sleep)
apart = subprocess.Popen(sleep, start_new_session=True)
open(sys.argv[1], "w").write(f"{child.pid} {apart.pid}")
print("began", flush=True)
time.sleep(float(sys.argv[2]))
"""


def _pids(file: Path) -> list[int]:
    end = time.monotonic() + SLOW_S
    while time.monotonic() < end:
        if file.exists() and file.read_text():
            return [int(pid) for pid in file.read_text().split()]
        time.sleep(0.05)
    raise AssertionError(f"{file} was not written")


def _ends(pid: int) -> bool:
    end = time.monotonic() + SLOW_S
    while time.monotonic() < end:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def test_a_command_past_its_limit_ends_with_its_children(tmp_path: Path) -> None:
    """In time, and what it said is there, though a process apart keeps its output open."""
    file = tmp_path / "pids"
    started = time.monotonic()
    done = call([sys.executable, "-c", PARENT, str(file), "90"], limit_s=10)
    child, apart = _pids(file)
    try:
        assert done.code is None
        assert done.output == "began\n"
        assert time.monotonic() - started < 60
        assert _ends(child)
    finally:
        os.kill(apart, signal.SIGKILL)


def test_what_a_command_leaves_behind_is_ended(tmp_path: Path) -> None:
    """It holds the device, and would disturb what comes next."""
    file = tmp_path / "pids"
    command = "import subprocess, sys; p = subprocess.Popen(['sleep', '90'], stdout=-3, stderr=-3)"
    command += "; open(sys.argv[1], 'w').write(str(p.pid))"
    done = call([sys.executable, "-c", command, str(file)], limit_s=SLOW_S)
    assert done.code == 0
    assert _ends(*_pids(file))


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_command_ends_with_the_call(tmp_path: Path, ending: signal.Signals) -> None:
    """Of a call that is ended by any signal, at once."""
    file = tmp_path / "pid"
    sleeper = f"import os, time; open({str(file)!r}, 'w').write(str(os.getpid())); time.sleep(90)"
    caller = (
        "import sys; from benchmarks.gpu_processes import call, end_on_signals; end_on_signals(); "
        f"call([sys.executable, '-c', {sleeper!r}], 90)"
    )
    process = subprocess.Popen([sys.executable, "-c", caller], cwd=ROOT, stderr=subprocess.DEVNULL)
    (pid,) = _pids(file)
    process.send_signal(ending)
    assert process.wait(SLOW_S) != 0
    assert _ends(pid)


def test_a_process_that_crashes_is_a_row_that_says_so() -> None:
    """By the signal's name; nothing waits for its answer."""
    waiting = Waiting("cpu")
    assert waiting._process.pid is not None
    os.kill(waiting._process.pid, signal.SIGSEGV)
    row = waiting.measure(POINT, False, left_s=100)
    assert row is not None
    assert row["error"] == "its process was ended by SIGSEGV"
    assert row["size"] == "tiny"


def test_a_signal_to_all_processes_of_a_call_is_no_result() -> None:
    """The point is measured by the next call."""
    waiting = Waiting("cpu")
    waiting._process.terminate()
    assert waiting.measure(POINT, False, left_s=100) is None
