"""Ranks that never come to the meeting, and ranks whose launcher is gone: nobody waits for long."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from pipeline.distributed.processes import process_is_gone
from tests.support.long_forms import part_of
from tests.support.training_runs import free_port, last_step

ROOT = Path(__file__).parents[3]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that a test starts; they and what they started are killed afterwards."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        for pid in [*_children(process.pid), process.pid]:
            _kill(pid)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _train(config: Path, *settings: str, **variables: str) -> subprocess.Popen[str]:
    """A rank as a process of its own, by hand."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.train", str(config), "--set", "run.seed=7", *settings],
        cwd=ROOT,
        env={**os.environ, **variables, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _rank(rank: int, world: int, port: int) -> Mapping[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def _kill(pid: int) -> None:
    if not process_is_gone(pid):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("victim", part_of((0, 1), lambda _, victim: victim == 1))
def test_a_rank_killed_before_the_meeting_is_named(
    config: Path, started: list[subprocess.Popen[str]], victim: int
) -> None:
    """The others end within seconds, with its number, process and host; no port is blamed."""
    port = free_port()
    started += [_train(config, **_rank(rank, 2, port)) for rank in range(2)]
    time.sleep(2.0)  # it has started and still imports its libraries
    started[victim].kill()
    killed = time.monotonic()
    output = started[1 - victim].communicate(timeout=60)[0]
    assert time.monotonic() - killed < 30
    assert started[1 - victim].returncode == 2
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output
    assert f"rank {victim}/2 (process {started[victim].pid} on {socket.gethostname()})" in errors[0]
    assert "ended before all ranks had joined" in errors[0]
    assert "MASTER_PORT" not in errors[0]


@pytest.mark.stress
def test_rank_0_killed_while_the_others_wait_is_named(
    config: Path, started: list[subprocess.Popen[str]]
) -> None:
    """Its store is gone with it: that says nothing about the port, and the others say who ended."""
    port = free_port()
    started += [_train(config, **_rank(rank, 3, port)) for rank in range(2)]
    deadline = time.monotonic() + 60
    while _connections(port) < 1:  # rank 1 has come to the store of rank 0; rank 2 never will
        assert time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(1.0)
    started[0].kill()
    output = started[1].communicate(timeout=60)[0]
    assert f"error: rank 1/3: rank 0/3 (process {started[0].pid} on" in output, output
    assert "MASTER_PORT" not in output


def _connections(port: int) -> int:
    """Connections to a port of this host that are established."""
    tables = [Path("/proc/net/tcp"), Path("/proc/net/tcp6")]
    lines = [line for path in tables if path.exists() for line in path.read_text().splitlines()[1:]]
    fields = [line.split() for line in lines]
    return sum(f[2].endswith(f":{port:04X}") and f[3] == "01" for f in fields)


@pytest.mark.stress
def test_a_fault_of_one_node_is_said_by_its_rank(
    config: Path, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    """Rank 1 lacks the file that rank 0 has: it says so itself, and rank 0 names it."""
    port = free_port()
    missing = tmp_path / "not on this node.yaml"
    started += [_train(config, **_rank(0, 2, port)), _train(missing, **_rank(1, 2, port))]
    outputs = [process.communicate(timeout=60)[0] for process in started]
    assert [process.returncode for process in started] == [2, 2]
    assert f"error: rank 1/2: {missing} does not exist" in outputs[1]
    assert "error: rank 1/2 (process" in outputs[0]
    assert "its own output says why" in outputs[0]


@pytest.mark.stress
def test_what_all_ranks_would_say_is_said_once(
    config: Path, started: list[subprocess.Popen[str]]
) -> None:
    """A refused value: rank 0 alone prints it."""
    port = free_port()
    started += [_train(config, "train.steps=-1", **_rank(rank, 2, port)) for rank in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in started]
    assert [process.returncode for process in started] == [2, 2]
    assert "train.steps=-1" in outputs[0]
    assert outputs[1] == ""


@pytest.mark.stress
def test_a_rank_that_never_comes_is_named_with_its_host(
    config: Path, started: list[subprocess.Popen[str]]
) -> None:
    """After `train.timeout_s`; who is missing, where, and what it must have in common."""
    started.append(_train(config, "train.timeout_s=4", **_rank(0, 3, free_port())))
    output = started[0].communicate(timeout=60)[0]
    assert started[0].returncode == 2
    host = socket.gethostname()
    assert f"error: rank 1 on {host}, rank 2 on {host} did not join the job within" in output
    assert "train.timeout_s=4" in output


@pytest.mark.parametrize(
    "moment", part_of(("before the meeting", "in training"), lambda number, _: number == 0)
)
def test_orphans_of_torchrun_end(
    config: Path, tmp_path: Path, started: list[subprocess.Popen[str]], moment: str
) -> None:
    """When torchrun is killed its ranks do not train on, nor wait for each other."""
    command = [*TORCHRUN, "-m", "pipeline.train", str(config), "--set", "train.steps=100000"]
    started.append(
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    )
    deadline = time.monotonic() + 120
    ranks: list[int] = []
    while len(ranks) < 2 or (moment == "in training" and last_step(tmp_path / "run") < 2):
        assert time.monotonic() < deadline
        time.sleep(0.2)
        ranks = _children(started[0].pid)
    started[0].kill()
    killed = time.monotonic()
    while not all(process_is_gone(rank) for rank in ranks):
        assert time.monotonic() - killed < 40
        time.sleep(0.2)
    output = started[0].communicate()[0]
    assert re.search(r"error: .*(launcher|agent|has died)", output), output
