"""Programs that nobody has read, each run once in processes of its own.

What a program cannot do, whatever it tries, where the machine has namespaces:

    time            it is killed after so many seconds of the clock, with all it has started
    memory, CPU     limits of each of its processes, of which there are few
    files           it sees the system's programs and the interpreter, read-only, and a /tmp of its
                    own, of 64 MiB, which is gone with it
    network         none, not even to this machine
    processes       it sees and signals none but its own
    environment     empty; no descriptor but one, to which it may write its verdict

Its output goes nowhere. Whether it has come to its end is told by a token that the judge, in the
same interpreter, writes to that descriptor: leaving early, printing or raising is no end. A program
that looks for the token on purpose can find it in the judge's frame; then it is wrong about
itself, and still can do nothing else.
"""

import json
import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from foundation.json_text import parse_json
from foundation.shown_text import printable
from model.errors import ConfigError
from pipeline.sandbox import judge, launcher

_PROCESSES = 8
_FILE_BYTES = 16 << 20
_OPEN_FILES = 64
_MARGIN_S = 10.0  # for the launcher to start, and to end by itself
_LONGEST_VERDICT = 1 << 16
_TIME_IS_OVER, _NOT_STARTED = 124, 125
_SIGNALLED = 192  # exit statuses from here on are negative ones, of signals


class Limits(NamedTuple):
    """What a program may use.

    Attributes:
        seconds: of the clock, and of the CPU in each of its processes.
        memory_bytes: of addresses in each of its processes.
    """

    seconds: float = 5.0
    memory_bytes: int = 512 << 20


class Verdict(NamedTuple):
    """How a program ended.

    Attributes:
        passed: whether it came to its end.
        reason: "passed", or why not.
    """

    passed: bool
    reason: str


class SandboxUnavailableError(Exception):
    """This machine does not allow the namespaces; the message says which."""


class Sandbox:
    """Runs programs, each in a sandbox of its own; may be used by several threads.

    Args:
        limits: of each program.
        confined: with namespaces. Without them the limits of time and memory hold for each
            process, and a program can read, write, send and kill whatever the user can.
        user_namespace: take a user namespace even as root, who needs none.
    """

    def __init__(
        self, limits: Limits, *, confined: bool = True, user_namespace: bool = False
    ) -> None:
        self.limits = limits
        self.confined = confined
        self._user_namespace = user_namespace
        self._launcher, self._judge = _as_program(launcher), _as_program(judge)
        self._python = os.path.realpath(sys.executable)
        self._readable = _interpreter_folders(self._python)

    def run(self, program: str) -> Verdict:
        """Run a program.

        Raises:
            SandboxUnavailableError: the machine does not allow it; nothing was run.
        """
        token = secrets.token_hex(16)
        with tempfile.TemporaryDirectory(prefix="headway-sandbox-") as folder:
            reading, writing = os.pipe()
            try:
                command = [self._python, "-I", "-S", "-c", self._launcher, str(writing)]
                with subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    pass_fds=(writing,),
                    env={},
                    start_new_session=True,
                ) as process:
                    job = self._job(program, token, folder)
                    answer = _converse(process, job, self.limits.seconds + _MARGIN_S)
                os.set_blocking(reading, False)
                written = _read(reading)
            finally:
                os.close(reading)
                os.close(writing)
        return _verdict(answer, process.returncode, written, token)

    def _job(self, program: str, token: str, folder: str) -> bytes:
        """What the launcher reads."""
        cpu_s = int(self.limits.seconds) + 1
        limits = {
            "RLIMIT_CPU": cpu_s,
            "RLIMIT_AS": self.limits.memory_bytes,
            "RLIMIT_FSIZE": _FILE_BYTES,
            "RLIMIT_NOFILE": _OPEN_FILES,
            "RLIMIT_CORE": 0,
        }
        if self.confined:
            # Elsewhere it would count all processes of the account, and none of root's.
            limits["RLIMIT_NPROC"] = _PROCESSES
        job = {
            "parent": os.getpid(),
            "program": program,
            "token": token,
            "judge": self._judge,
            "python": self._python,
            "readable": self._readable,
            "folder": folder,
            "confined": self.confined,
            "user_namespace": self._user_namespace,
            "seconds": self.limits.seconds,
            "limits": limits,
        }
        return json.dumps(job).encode()


def open_sandbox(limits: Limits, *, allow_unconfined: bool) -> Sandbox:
    """A sandbox in which a program has been run.

    Args:
        limits: of each program.
        allow_unconfined: go without namespaces where the machine does not allow them.

    Raises:
        ConfigError: naming what the machine does not allow, or a limit that is too small.
    """
    sandbox = Sandbox(limits)
    try:
        verdict = sandbox.run("pass")
    except SandboxUnavailableError as error:
        if not allow_unconfined:
            raise ConfigError(
                f"generated code cannot be locked up here ({error}); allow unprivileged user "
                "namespaces (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, "
                "kernel.apparmor_restrict_unprivileged_userns), leave the container, or run it "
                "with all that your account may do by --allow-unsandboxed"
            ) from None
        sandbox = Sandbox(limits, confined=False)
        verdict = sandbox.run("pass")
    if not verdict.passed:
        raise ConfigError(
            f"an empty program does not run within --time-limit {limits.seconds:g} and "
            f"--memory-mib {limits.memory_bytes >> 20} ({verdict.reason}); give it more"
        )
    return sandbox


def _as_program(module: ModuleType) -> str:
    """The text of a module that has a function `main`, with a call of it."""
    assert module.__file__ is not None
    return Path(module.__file__).read_text("utf-8") + "\nmain()\n"


def _interpreter_folders(python: str) -> list[str]:
    """The folders that the interpreter starts from, none inside another."""
    found = {os.path.realpath(path) for path in (sys.base_prefix, sys.base_exec_prefix)}
    found.add(os.path.dirname(python))
    outer = [path for path in found if not any(_is_below(path, other) for other in found)]
    return sorted(path for path in outer if not _is_below(path, "/usr"))


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")


def _converse(process: "subprocess.Popen[bytes]", job: bytes, seconds: float) -> str:
    """Give the job and wait for the end; the launcher's answer."""
    try:
        answer, _ = process.communicate(job, timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        answer, _ = process.communicate()
    except BaseException:
        process.kill()  # with it goes all that it has started
        raise
    return answer.decode("utf-8", "replace").strip()


def _read(descriptor: int) -> bytes:
    """What was written to a pipe, at most as much as it holds."""
    try:
        return os.read(descriptor, _LONGEST_VERDICT)
    except BlockingIOError:
        return b""


def _verdict(answer: str, status: int, written: bytes, token: str) -> Verdict:
    if answer.startswith("error "):
        raise SandboxUnavailableError(answer.removeprefix("error "))
    if answer != "ready":
        raise SandboxUnavailableError(f"its launcher ended with status {status}")
    if status == _NOT_STARTED:
        raise SandboxUnavailableError("the interpreter cannot be started inside")
    if status == _TIME_IS_OVER or status < 0:
        return Verdict(False, "timed out")
    if status >= _SIGNALLED:
        return Verdict(False, f"killed by signal {256 - status}")
    if written == json.dumps({"token": token}).encode():
        return Verdict(True, "passed")
    try:
        said = parse_json(written)
    except ValueError:
        return Verdict(False, f"ended before its checks did, with status {status}")
    reason = said.get("failed") if isinstance(said, dict) else None
    return Verdict(False, printable(reason) if isinstance(reason, str) else "wrote another verdict")
