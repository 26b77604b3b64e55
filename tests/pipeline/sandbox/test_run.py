"""Programs that try to get out of the sandbox, to stay, or to pass without their checks."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from model.errors import ConfigError
from pipeline.sandbox.run import Limits, Sandbox, SandboxUnavailableError, open_sandbox

ROOT = Path(__file__).parents[3]
PATIENT = Limits(seconds=60.0)
HASTY = Limits(seconds=1.5)


def _sandbox(limits: Limits, *, user_namespace: bool) -> Sandbox:
    """One that works; on a machine without namespaces there is nothing to test."""
    sandbox = Sandbox(limits, user_namespace=user_namespace)
    try:
        sandbox.run("pass")
    except SandboxUnavailableError as error:
        pytest.skip(f"this machine has no namespaces for us: {error}")
    return sandbox


@pytest.fixture(params=[False, True], ids=["own", "user_namespace"])
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    """With the namespaces of this account, and with those of an ordinary user."""
    return _sandbox(PATIENT, user_namespace=request.param)


def test_a_program_passes_at_its_end(sandbox: Sandbox) -> None:
    """Also with threads that go on, and after it has printed what it likes."""
    assert sandbox.run("print('anything')\nassert 1 + 1 == 2") == (True, "passed")
    sleeper = "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()"
    assert sandbox.run(sleeper).passed


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 + 1 == 3, 'sums'", "AssertionError: sums"),
        ("def f(:", "SyntaxError"),
        ("import os; os._exit(0)", "ended before its checks did"),
        ("print('passed'); import sys; sys.exit(0)", "SystemExit"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("import os; os.write(3, b'passed'); raise ValueError", "ended before"),
        ("import os; os.write(3, b'[' * 60000); os._exit(0)", "ended before"),
        ('import os; os.write(3, b\'{"token": "0"}\'); os._exit(0)', "wrote another verdict"),
        ("import os; os.close(3); x = 1", "ended before"),
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9"),
        ("import threading, os, time\n"
         "threading.Thread(target=os._exit, args=(0,)).start(); time.sleep(9)", "ended before"),
        ("import json, os\njson.dumps = os.write = lambda *_: 1 / 0\nassert False",
         "AssertionError"),
        ("class E(Exception):\n    def __str__(self):\n        raise self\nraise E", "E: "),
        ("def f(): f()\nf()", "RecursionError"),
        ("x = bytearray(1 << 30)", "MemoryError"),
        ("open('/tmp/x', 'wb').write(bytes(32 << 20))", "OSError"),
        ("for i in range(99):\n    open(f'/tmp/{i}', 'wb').write(bytes(15 << 20))", "OSError"),
        ("open('/usr/x', 'w')", "OSError"),
        ("import os; os.symlink('/x', '/usr/x')", "OSError"),
    ],
)  # fmt: skip
def test_no_other_way_to_pass(program: str, reason: str) -> None:
    """Leaving, printing, raising, writing a verdict, filling memory or disk: each is told apart."""
    verdict = _sandbox(PATIENT, user_namespace=False).run(program)
    assert not verdict.passed
    assert reason in verdict.reason


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
        "while True: print('x' * 100000)",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "import os, time\nif os.fork() == 0:\n    os.setsid()\ntime.sleep(600)",
        "try:\n    while True: pass\nexcept BaseException: pass",
    ],
)  # fmt: skip
def test_time_ends_everything(program: str) -> None:
    """Loops, ignored signals, endless output, fork bombs: nothing of them is left."""
    before = psutil.Process().children(recursive=True)  # servers that other tests share
    assert _sandbox(HASTY, user_namespace=False).run(program) == (False, "timed out")
    assert set(psutil.Process().children(recursive=True)) <= set(before)


def test_few_processes() -> None:
    """A program that forks soon cannot; the kernel counts for all accounts but root's own."""
    sandbox = _sandbox(PATIENT, user_namespace=False)
    forks = "import os, time\nfor _ in range(50):\n    if os.fork() == 0: time.sleep(600)"
    assert sandbox.run(forks).reason.startswith("BlockingIOError")


def test_files_outside_are_not_there(sandbox: Sandbox, tmp_path: Path) -> None:
    """Neither read, changed nor deleted, whoever may do that outside."""
    tmp_path.chmod(0o777)
    secret = tmp_path / "secret"
    secret.write_text("the expected answer")
    secret.chmod(0o666)
    for path in (secret, ROOT / "setup.py", Path("/etc/passwd"), Path("/proc/1/environ")):
        assert sandbox.run(f"open({str(path)!r})").reason.startswith("FileNotFoundError")
        assert not sandbox.run(f"import os; os.remove({str(path)!r})").passed
    assert sandbox.run(
        "import os\nassert sorted(os.listdir('/tmp')) == [], os.listdir('/tmp')\n"
        "open('/tmp/mine', 'w').write('x')\nassert os.getcwd() == '/tmp'"
    ).passed
    assert secret.read_text() == "the expected answer"


def test_no_network(sandbox: Sandbox) -> None:
    """Not even to this machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        connect = f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)"
        assert "OSError" in sandbox.run(connect).reason
        with pytest.raises(TimeoutError):
            server.accept()


def test_nothing_of_the_parent(sandbox: Sandbox) -> None:
    """No variables, no descriptors but its own, no processes, no privileges to be had again."""
    assert sandbox.run("import os\nassert set(os.environ) <= {'LC_CTYPE'}, os.environ").passed
    descriptors = (
        "import os\nopen_ones = []\nfor i in range(64):\n    try:\n        os.fstat(i)\n"
        "        open_ones.append(i)\n    except OSError: pass\n"
        "assert open_ones == [0, 1, 2, 3], open_ones\n"
        "for i in (0, 1, 2):\n    assert os.fstat(i).st_rdev == os.stat('/dev/null').st_rdev"
    )
    assert sandbox.run(descriptors) == (True, "passed")
    assert sandbox.run(f"import os; os.kill({os.getpid()}, 0)").reason.startswith("ProcessLookup")
    assert sandbox.run(f"import os; assert os.getuid() not in (0, {os.getuid()})").passed
    privileges = (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "for flag in (0x00020000, 0x10000000, 0x20000000, 0x40000000):\n"
        "    assert libc.unshare(flag) < 0\n"
        "assert libc.mount(b'x', b'/tmp', b'tmpfs', 0, None) < 0\n"
        "assert libc.ptrace(16, 1, 0, 0) < 0\nassert libc.chroot(b'/tmp') < 0"
    )
    assert sandbox.run(privileges) == (True, "passed")


def test_samples_do_not_see_one_another(sandbox: Sandbox) -> None:
    """What one leaves behind is gone."""
    assert sandbox.run("open('/tmp/note', 'w').write('x')").passed
    assert sandbox.run("import os; assert not os.path.exists('/tmp/note')").passed


def test_a_program_that_looks_for_the_token_finds_it(sandbox: Sandbox) -> None:
    """The known limit: checks and what they check are in one interpreter, which hides nothing."""
    cheat = (
        "import json, os, sys\njob = sys._getframe(1).f_locals['job']\n"
        "os.write(3, json.dumps({'token': job['token']}).encode())\nos._exit(0)"
    )
    assert sandbox.run(cheat).passed


def test_without_namespaces_it_refuses_or_says_what_holds() -> None:
    """In a user namespace that may have none below it; limits of time and memory still hold."""
    # A process of its own, since there is no way back.
    script = """
import ctypes, json, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x10000000) < 0:
    sys.exit(77)
open("/proc/sys/user/max_user_namespaces", "w").write("0")
from model.errors import ConfigError
from pipeline.sandbox.run import Limits, open_sandbox
try:
    open_sandbox(Limits(60.0), allow_unconfined=False)
except ConfigError as error:
    print(error)
quick = open_sandbox(Limits(60.0), allow_unconfined=True)
print(json.dumps([quick.confined, quick.run("x = 1"), quick.run("x = bytearray(1 << 30)")]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode == 77 or "max_user_namespaces" in done.stderr:
        pytest.skip("this machine has no user namespaces to begin with")
    refusal, rest = done.stdout.splitlines()
    assert "cannot be locked up here (" in refusal
    assert "a user namespace" in refusal
    assert "--allow-unsandboxed" in refusal
    assert json.loads(rest) == [False, [True, "passed"], [False, "MemoryError: "]]


def test_unconfined_programs_end_with_all_they_started(tmp_path: Path) -> None:
    """A child in a session of its own is killed, too."""
    script = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n"
        f"    open({str(tmp_path / 'child')!r}, 'w').write(str(os.getpid()))\n    time.sleep(600)\n"
        f"while not os.path.exists({str(tmp_path / 'child')!r}): time.sleep(0.01)"
    )
    assert Sandbox(PATIENT, confined=False).run(script).passed
    assert not psutil.pid_exists(int((tmp_path / "child").read_text() or "0"))


def test_limits_that_allow_nothing_are_named() -> None:
    """An interpreter needs some memory."""
    with pytest.raises(ConfigError, match=r"--memory-mib 1 .*give it more|cannot be locked up"):
        open_sandbox(Limits(60.0, 1 << 20), allow_unconfined=False)
