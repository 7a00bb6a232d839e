"""A Ray cluster of three nodes on this machine, smaller than the share of a worker, and a run on it.

    python -m tests.support.processes.three_nodes CACHE OUT WORKERS

Prints a JSON object: the result's step, or the error.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from potstill.cache.errors import PotstillError
from tests.support.tiny_runs import config_of

CPUS = (1, 1, 2)


def main(root: str, out: str, workers: str) -> None:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    from potstill.student_trainer.launch.ray import train_with_ray

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": CPUS[0], "include_dashboard": False})
    try:
        for cpus in CPUS[1:]:
            cluster.add_node(num_cpus=cpus)
        config = config_of(Path(root), Path(out), train={"workers": int(workers), "steps": 3})
        try:
            print(json.dumps({"step": train_with_ray(config, address=cluster.address).step}))
        except PotstillError as error:
            print(json.dumps({"error": error.detail}))
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
