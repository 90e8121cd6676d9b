"""A Ray cluster of several nodes runs on this machine, for the tests that need one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from helpers import source_env

NO_RAY = "Ray is not installed; extra ray has it"
NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}


@contextmanager
def two_nodes() -> Iterator[Any]:
    """A cluster with two nodes, a processor each, to which this process is connected. It skips the test without Ray."""
    ray = pytest.importorskip("ray", reason=NO_RAY)
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason=NO_RAY)
    path = os.pathsep.join([source_env()["PYTHONPATH"], str(Path(__file__).resolve().parent)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **NODE})
        try:
            cluster.add_node(**NODE)
            cluster.wait_for_nodes()
            ray.init(address=cluster.address, log_to_driver=False, logging_level="warning")
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()
