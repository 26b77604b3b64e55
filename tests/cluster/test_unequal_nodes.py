"""Nodes that are not alike: the step takes what each of them has."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import running
from tests.cluster.jobs import Job, interpreter, light_run, trained_steps
from tests.cluster.settings import Node, Settings
from tests.cluster.testbed import Cluster

pytestmark = pytest.mark.cluster


@pytest.fixture
def unequal() -> Iterator[Cluster]:
    """A large and a small node."""
    yield from running(Settings(nodes=(Node(cpus=16, gpus=8), Node(cpus=4, gpus=8))))


def test_the_smaller_node_sets_the_share(unequal: Cluster, tmp_path: Path) -> None:
    """Each process gets the CPUs that it can have on every node."""
    job = Job(
        unequal,
        tmp_path,
        "slurm/pretrain_7b.sh",
        options=["--nodes=2", "--ntasks-per-node=2"],
        arguments=[str(light_run(tmp_path, steps=3))],
        PYTHON=interpreter(tmp_path),
    )
    assert job.finish() == "COMPLETED", job.log
    assert "--ntasks-per-node=2 --cpus-per-task=2" in job.log
    assert trained_steps(tmp_path) == [1, 2, 3]
