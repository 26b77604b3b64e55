"""A cluster for the tests of this folder, one for all of them that want the same."""

from collections.abc import Iterator

import pytest

from tests.cluster.settings import Settings
from tests.cluster.testbed import Cluster, why_not
from tests.pipeline.conftest import config, shards

__all__ = ["config", "shards"]


@pytest.fixture(scope="session")
def four_nodes() -> Iterator[Cluster]:
    """Four equal nodes; see `cluster`."""
    yield from running(Settings())


@pytest.fixture
def cluster(four_nodes: Cluster) -> Iterator[Cluster]:
    """Four equal nodes of 16 CPUs and 8 GPUs, idle; what a test broke is mended afterwards."""
    yield four_nodes
    four_nodes.mend()


def running(settings: Settings) -> Iterator[Cluster]:
    """A cluster that runs until the caller is done with it; where none can, the test is skipped."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    cluster = Cluster(settings)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
