"""A real Slurm on one machine: munged, slurmctld, and a slurmd in namespaces of its own per node.

Each node has its own address, name, processes, /dev/shm and local disk; all see this machine's
files, as the nodes of a cluster see its shared file system. Everything it starts ends with the
process that started it, however that ends.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.cluster.settings import Settings, node_name, slurm_files

NODE_SCRIPT = Path(__file__).with_name("node.sh")
PROGRAMS = {
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "sbatch": "slurm-wlm",
    "munged": "munge",
    "ip": "iproute2",
    "setpriv": "util-linux",
    "unshare": "util-linux",
}
_READ_BY_JOBS = {
    *("APPTAINER", "ARGS", "CONFIG", "CONTAINER_IMAGE", "HEADWAY_ROOT", "INPUT", "MASTER_PORT"),
    *("MAX_IDLE_REQUEUES", "MPIRUN", "OMP_NUM_THREADS", "OUTPUT", "PYTHON", "RANKS_PER_NODE"),
    *("SRUN_ARGS", "TOKENIZER"),
}
_CGROUPS_DISABLED_SINCE = 24  # the release whose plugin list knows "disabled"


def why_not() -> str | None:
    """Why no cluster can be started here, and what to do; None when it can."""
    packages = sorted({package for name, package in PROGRAMS.items() if not shutil.which(name)})
    if packages:
        return (
            f"the test cluster needs {', '.join(packages)}: "
            f"apt-get install --no-install-recommends {' '.join(packages)}"
        )
    if os.geteuid() != 0:
        return "the test cluster makes network namespaces, which only root may: use sudo"
    probe = [*("unshare", "--net", "--uts", "--ipc", "--pid", "--mount", "--fork"), "true"]
    tried = subprocess.run(probe, capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"the test cluster needs namespaces, and unshare says: {tried.stderr.strip()}"
    return None


class Cluster:
    """The cluster, from `start` to `stop`.

    Args:
        settings: its nodes and times.

    Attributes:
        folder: its state and logs; shared by all nodes.
        local_folder: a folder that is another one on each node.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        # Short: the path of a socket has at most 107 letters.
        self.folder = Path(tempfile.mkdtemp(prefix="headway-slurm-"))
        self.local_folder = self.folder / "local"
        self.nodes = [node_name(index) for index in range(len(settings.nodes))]
        token = secrets.token_hex(2)
        self._bridge = f"hw{token}"
        self._network = f"10.{64 + int(token[:2], 16) % 64}.{int(token[2:], 16)}"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._configuration = self.folder / "etc" / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which Slurm's commands find this cluster and no other.

        Those that job scripts read are left out: sbatch would hand them to the job, and
        `make ARGS=...`, for one, gives its own to all that it starts.
        """
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM", "SBATCH")) and name not in _READ_BY_JOBS
        }
        return inherited | {"SLURM_CONF": str(self._configuration)}

    def start(self) -> None:
        """Start everything, and wait until all nodes have registered.

        Raises:
            AssertionError: with the daemons' logs, when one of them does not come up.
        """
        for name in ("etc", "spool", "log", "nodes", "local", "gpus", "controller"):
            (self.folder / name).mkdir()
        self.folder.chmod(0o755)
        for index in range(max(node.gpus for node in self.settings.nodes)):
            (self.folder / "gpus" / f"gpu{index}").symlink_to("/dev/null")
        self._write_files()
        self._start_munge()
        _call("ip", "link", "add", self._bridge, "type", "bridge")
        _call("ip", "addr", "add", f"{self._network}.254/24", "dev", self._bridge)
        _call("ip", "link", "set", self._bridge, "up")
        self.start_controller()
        for name in self.nodes:
            self.boot(name)
        self.wait(lambda: self._usable("idle") == len(self.nodes), "all nodes are up", 30)

    def stop(self) -> None:
        """End every process and take away everything that `start` made."""
        for process in reversed(list(self._processes.values())):
            process.kill()
            process.wait()
        subprocess.run(["ip", "link", "del", self._bridge], capture_output=True, check=False)
        for index in range(len(self.nodes)):
            card = ["ip", "link", "del", self._card(index)]
            subprocess.run(card, capture_output=True, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def remaining(self) -> list[int]:
        """Processes that name the cluster's folder in their command or environment."""
        folder = str(self.folder).encode()
        return [pid for pid in _pids() if pid != os.getpid() and folder in _written_on(pid)]

    def run(self, *command: str, check: bool = True, environment: Mapping[str, str] = {}) -> str:
        """Run one of Slurm's commands as a user does; its output."""
        done = subprocess.run(
            command,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}{done.stdout}"
        return done.stdout

    def boot(self, node: str) -> None:
        """Switch a node on."""
        plugged = self.folder / "nodes" / f"{node}.plugged"
        plugged.unlink(missing_ok=True)
        spaces = ["--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--mount-proc"]
        process = self._start(
            node,
            [
                *("unshare", *spaces, "--kill-child=KILL"),
                *("bash", str(NODE_SCRIPT), str(self.folder), node),
            ],
        )
        ours = os.readlink("/proc/self/ns/net")
        namespace = f"/proc/{process.pid}/ns/net"
        self.wait(lambda: os.readlink(namespace) != ours, f"{node} has a network")
        self._plug_in(self.nodes.index(node), process.pid)
        plugged.touch()

    def crash(self, node: str) -> None:
        """Cut a node's power."""
        process = self._processes.pop(node)
        process.kill()
        process.wait()

    def cut(self, node: str) -> None:
        """Pull a node's network cable."""
        _call("ip", "link", "set", self._card(self.nodes.index(node)), "down")

    def join(self, node: str) -> None:
        """Plug a node's network cable in again."""
        _call("ip", "link", "set", self._card(self.nodes.index(node)), "up")

    def kill_controller(self) -> None:
        """Kill slurmctld; jobs go on without it."""
        process = self._processes.pop("slurmctld")
        process.kill()
        process.wait()

    def start_controller(self) -> None:
        """Start slurmctld."""
        self._start("slurmctld", ["slurmctld", "-D"])

    def mend(self) -> None:
        """Cancel what still runs, and bring back nodes and controller that a test broke."""
        if "slurmctld" not in self._processes:
            self.start_controller()
        self.run("scancel", "--user=root", check=False)
        for name in self.nodes:
            if name in self._processes:
                self.join(name)
            else:
                self.boot(name)
        self.wait(lambda: not self.run("squeue", "--noheader"), "no job is left", 90)
        # Slurm drains nodes whose tasks it counts as unkillable, such as those of a job that ended
        # while there was no controller to tell.
        for name in self.nodes:
            if "DRAIN" in self.run("scontrol", "show", "node", name):
                self.run("scontrol", "update", f"NodeName={name}", "State=RESUME")
        self.wait(lambda: self._usable("idle") == len(self.nodes), "all nodes are idle", 60)

    def processes_of(self, node: str, *words: str) -> list[int]:
        """Numbers, as this machine counts, of a node's processes whose command has all words."""
        space = os.readlink(f"/proc/{self._first_process(node)}/ns/pid")
        return [pid for pid in _pids() if _is_of(pid, space, words)]

    def kill(self, node: str, *words: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to the processes of a node whose command has all words."""
        found = self.processes_of(node, *words)
        assert found, f"no process with {words} on {node}"
        for pid in found:
            with contextlib.suppress(ProcessLookupError):  # one ends with another
                os.kill(pid, number)

    def wait(
        self, condition: Callable[[], object], what: str, timeout_s: float = 60, poll_s: float = 0.1
    ) -> None:
        """Wait until something is so.

        Raises:
            AssertionError: it was not within the time; with the controller's last words.
        """
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what}\n{self.logs()}"
            time.sleep(poll_s)

    def logs(self) -> str:
        """The last lines of every daemon."""
        texts = []
        for path in sorted((self.folder / "log").glob("*")):
            lines = path.read_text(errors="replace").splitlines()[-25:]
            texts += [f"== {path.name}", *lines]
        return "\n".join(texts)

    def _write_files(self) -> None:
        host = socket.gethostname().partition(".")[0]
        ports = (_free_port(), _free_port())
        files = slurm_files(
            self.settings, self.folder, host=host, network=self._network, ports=ports
        )
        # Where slurmd would look for cgroups there is nothing in a network namespace.
        version = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True, check=True)
        release = int(version.stdout.split()[-1].partition(".")[0])
        plugin = "disabled" if release >= _CGROUPS_DISABLED_SINCE else "cgroup/v1"
        files["cgroup.conf"] = f"CgroupPlugin={plugin}\n"
        for name, text in files.items():
            (self.folder / "etc" / name).write_text(text)
        addresses = [f"{self._network}.{i + 1} {name}" for i, name in enumerate(self.nodes)]
        hosts = ["127.0.0.1 localhost", f"{self._network}.254 {host}", *addresses]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        places = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid"}
        places |= {"log-file": "log/munged.log", "seed-file": "munge.seed"}
        options = [f"--{option}={self.folder / place}" for option, place in places.items()]
        self._start("munged", ["munged", "--foreground", "--force", *options])
        self.wait((self.folder / "munge.socket").exists, "munged listens", 10)

    def _start(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a daemon that ends with this process."""
        with (self.folder / "log" / f"{name}.out").open("wb") as output:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._processes[name] = process
        return process

    def _plug_in(self, index: int, pid: int) -> None:
        card, inside = self._card(index), ["nsenter", "--net", f"--target={pid}", "ip"]
        peer = ["peer", "name", "eth0", "netns", str(pid)]
        # The card of a node that lost its power goes a moment after the node's last process.
        subprocess.run(["ip", "link", "del", card], capture_output=True, check=False)
        self.wait(lambda: not Path("/sys/class/net", card).exists(), f"{card} is free")
        # The same address at each boot, as a real card has: other nodes remember it for a while.
        address = ["address", f"02:00:00:00:00:{index + 1:02x}"]
        _call("ip", "link", "add", card, "type", "veth", *peer, *address)
        _call("ip", "link", "set", card, "master", self._bridge, "up")
        _call(*inside, "link", "set", "lo", "up")
        _call(*inside, "addr", "add", f"{self._network}.{index + 1}/24", "dev", "eth0")
        _call(*inside, "link", "set", "eth0", "up")

    def _card(self, index: int) -> str:
        return f"{self._bridge}n{index + 1}"

    def _usable(self, *states: str) -> int:
        """How many nodes are in one of these states."""
        found = self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T")
        return sum(state in states for state in found.split())

    def _first_process(self, node: str) -> int:
        """The node's process 1, as this machine counts."""
        outer = self._processes[node].pid
        children = Path(f"/proc/{outer}/task/{outer}/children").read_text().split()
        assert children, f"{node} is not up\n{self.logs()}"
        return int(children[0])


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _written_on(pid: int) -> bytes:
    """Command line and environment of a process."""
    try:
        folder = Path(f"/proc/{pid}")
        return (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
    except OSError:  # it ended meanwhile
        return b""


def _is_of(pid: int, space: str, words: Sequence[str]) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        return os.readlink(f"/proc/{pid}/ns/pid") == space and all(w in command for w in words)
    except OSError:  # it ended meanwhile
        return False


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])
