"""The test cluster itself: what its nodes share and do not, and that nothing of it stays behind."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.cluster.settings import Node, Settings
from tests.cluster.testbed import Cluster, why_not

pytestmark = pytest.mark.cluster


def test_nodes_are_machines_of_their_own(cluster: Cluster) -> None:
    """Each node has its name, processes, GPUs and local disk; this machine's files are shared."""
    script = (
        'touch "$1/$SLURMD_NODENAME"; '
        'echo $(hostname) $(readlink /proc/self/ns/pid) $(ls "$1") $CUDA_VISIBLE_DEVICES'
    )
    local = str(cluster.local_folder)
    command = ["srun", "--nodes=4", "--gpus-per-node=h100:2", "bash", "-c", script, "bash", local]
    lines = sorted(cluster.run(*command).splitlines())
    assert [line.split()[0] for line in lines] == cluster.nodes
    spaces = {os.readlink("/proc/self/ns/pid")}  # of process numbers
    for line in lines:
        name, space, *files, gpus = line.split()
        assert (files, gpus) == ([name], "0,1")
        spaces.add(space)
    assert len(spaces) == 5
    assert not list(cluster.local_folder.iterdir())


@pytest.mark.stress
def test_a_node_can_be_switched_off_and_on(cluster: Cluster) -> None:
    """Slurm notices the power cut by itself, and takes the node back."""
    cluster.crash("node3")
    states = ["sinfo", "--noheader", "--nodes=node3", "--format=%T"]
    cluster.wait(lambda: "down" in cluster.run(*states), "node3 is down")
    cluster.boot("node3")
    cluster.wait(lambda: "idle" in cluster.run(*states), "node3 is back")


def test_nothing_is_left_behind() -> None:
    """After `stop` there is no process, network card, mount or file of the cluster."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)

    def traces() -> list[str]:
        links = subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True)
        mounts = Path("/proc/self/mounts").read_text().splitlines()
        return links.stdout.splitlines() + mounts + os.listdir("/etc/slurm")

    before = sorted(traces())
    cluster = Cluster(Settings(nodes=(Node(cpus=2, gpus=1), Node(cpus=4, gpus=0))))
    try:
        cluster.start()
        assert len(traces()) > len(before)
    finally:
        cluster.stop()
    assert sorted(traces()) == before
    assert not cluster.folder.exists()
    assert cluster.remaining() == []
