"""A Slurm for the tests in this folder."""

from collections.abc import Iterator

import pytest
from cluster import Cluster, NoCluster, running_cluster


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """A running Slurm of one node."""
    try:
        with running_cluster() as cluster:
            yield cluster
    except NoCluster as reason:
        pytest.skip(str(reason))
