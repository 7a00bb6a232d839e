"""A Ray cluster that loses a node and gets another, and a run with as many workers as have a place.

    python -m tests.support.processes.elastic_nodes CACHE OUT

Prints a JSON object: the result's step, and each number of workers that rows were trained by.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from potstill.student_trainer.metrics.records import Record
from tests.support.tiny_runs import config_of


def main(root: str, out: str) -> None:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.cluster_utils import Cluster

    from potstill.student_trainer.launch.ray import train_with_ray

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    other = cluster.add_node(num_cpus=1)
    taken: list[int] = []

    def take_away(record: Record) -> None:
        if record["step"] >= 25 and not taken:
            taken.append(len(busy()))
            cluster.remove_node(other)

    def busy() -> list[str]:
        available = ray.available_resources().get("CPU", 0.0)
        return ["busy"] * int(ray.cluster_resources().get("CPU", 0.0) - available)

    loop = {"workers": [1, 3], "steps": 60, "eval_every": 30, "checkpoint_every": 10, "max_preemptions": 1}
    environment = {"worker_runtime_env": {"env_vars": {"SET_FOR_WORKERS": "1"}}}
    try:
        config = config_of(Path(root), Path(out), train={**loop, **environment})
        result = train_with_ray(config, address=cluster.address, on_record=take_away)
        print(json.dumps({"step": result.step, "busy": taken}))
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
