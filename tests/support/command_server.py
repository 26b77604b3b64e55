"""A fast `python` and `torchrun` for command lines in tests.

Most of a command's second is the import of its libraries. One server imports them once and forks a
process for each command: the same `__main__`, folder, variables, arguments, streams and exit
status as a fresh interpreter's. What the shell finds as `python` is a client of a few lines.
"""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parent.parent.parent
_MOST_RANKS = 4  # torchrun with more of them starts FEWER_RANKS
_FEWER_RANKS = 2

# -S and -E: no site packages and no variables, so that it starts in some milliseconds.
_CLIENT = """#!{python} -SE
import json, os, signal, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
request = dict(arguments={prefix!r} + sys.argv[1:], folder=os.getcwd(), variables=dict(os.environ))
data = json.dumps(request).encode()
socket.send_fds(connection, [len(data).to_bytes(8, "big")], [0, 1, 2])
connection.sendall(data)
answers = connection.makefile()
pid = int(answers.readline())
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
status = int(answers.readline() or 70)
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


class CommandServer:
    """A server, and a folder with its clients to put first in PATH.

    Args:
        folder: where clients, socket and the server's log go.
    """

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        self._log = folder / "server.log"
        # A socket's path has at most 108 bytes, and pytest's folders are long.
        self._socket_folder = tempfile.TemporaryDirectory(prefix="commands-")
        self._address = f"{self._socket_folder.name}/socket"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, self._address],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._add_client("python", [])
        self._add_client("python3", [])
        self._add_client("torchrun", ["-m", "torch.distributed.run"])

    def __enter__(self) -> "CommandServer":
        """Wait until the libraries are loaded."""
        deadline = time.monotonic() + 180
        while not os.path.exists(self._address):
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, "the command server did not start in 180 s"
            time.sleep(0.05)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the server; commands that still run are the caller's."""
        self._process.kill()
        self._process.wait()
        self._socket_folder.cleanup()

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which a shell finds the clients."""
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST")},
            "PATH": f"{self.bin}:{Path(sys.executable).parent}:/usr/bin:/bin",
            "PYTHON_EXEC": str(self.bin / "python"),  # torchrun starts its ranks with this
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }

    def _add_client(self, name: str, prefix: list[str]) -> None:
        path = self.bin / name
        path.write_text(
            _CLIENT.format(
                python=os.path.realpath(sys.executable), address=self._address, prefix=prefix
            )
        )
        path.chmod(0o755)


def serve(address: str) -> None:
    """Load the libraries, then fork a process for each client that connects, until it is ended."""
    import gigatoken  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import transformers  # noqa: F401

    import pipeline.engine.build
    import pipeline.job  # noqa: F401
    import tests.support.harness_preload  # noqa: F401

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")
    listener.listen(64)
    os.rename(f"{address}.new", address)  # is there when it can be connected to
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped by the kernel
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _attend(connection)
        connection.close()


def _attend(connection: socket.socket) -> None:
    """Run one command in a child, send the child's number and status; never returns."""
    header, streams, *_ = socket.recv_fds(connection, 8, 3)
    size = int.from_bytes(header, "big")
    with connection.makefile("rb") as incoming:
        request = json.loads(incoming.read(size))
    if not (pid := os.fork()):
        connection.close()
        _become(request["arguments"], request["folder"], request["variables"], list(streams))
    connection.sendall(f"{pid}\n".encode())
    _, code = os.waitpid(pid, 0)
    status = os.waitstatus_to_exitcode(code)
    connection.sendall(f"{status}\n".encode())
    os._exit(0)


def _become(
    arguments: list[str], folder: str, variables: dict[str, str], streams: list[int]
) -> None:
    """Be the interpreter that was called; never returns."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(0, "r"),
        os.fdopen(1, "w", buffering=1),
        os.fdopen(2, "w", buffering=1),
    )
    code = 1
    try:
        _run([word for word in arguments if word != "-u"])
        code = 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        code = 0 if stop.code is None else stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except BrokenPipeError:
            code = 141
        os._exit(code)


def _run(arguments: list[str]) -> None:
    """The interpreter's own command line: -m MODULE, -c CODE, a script, or a program at stdin."""
    first, *rest = arguments or ["-"]
    if first == "-m":
        module, *rest = rest
        if module == "torch.distributed.run":
            rest = _fewer_ranks(rest)
        sys.path.insert(0, os.getcwd())
        sys.argv = [module, *rest]
        sys.modules.pop(module, None)  # imported by the server; runpy would warn
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return
    if first in ("-", "-c"):
        code, rest = (rest[0], rest[1:]) if first == "-c" else (sys.stdin.read(), rest)
        sys.path.insert(0, os.getcwd())
        sys.argv = [first, *rest]
        exec(compile(code, "<page>", "exec"), {"__name__": "__main__"})
        return
    sys.path.insert(0, str(Path(first).resolve().parent))
    sys.argv = [first, *rest]
    runpy.run_path(first, run_name="__main__")


def _fewer_ranks(arguments: list[str]) -> list[str]:
    """A launcher's arguments for this machine: no more ranks than it can carry."""
    changed = list(arguments)
    for index, word in enumerate(changed):
        if word == "--nproc-per-node" and int(changed[index + 1]) > _MOST_RANKS:
            changed[index + 1] = str(_FEWER_RANKS)
    return changed


if __name__ == "__main__":
    serve(sys.argv[1])
