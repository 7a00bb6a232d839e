"""A Ray cluster of which a node is about to be taken away, and a run on it.

    python -m tests.support.processes.leaving_node CACHE OUT

Prints a JSON object: the step of a checkpoint that no setting asked for, which Ray's notice did.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from potstill.student_trainer.checkpoint.folders import newest_checkpoint, step_of
from potstill.student_trainer.metrics.records import Record
from tests.support.tiny_runs import config_of


def main(root: str, out: str) -> None:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    from potstill.student_trainer.launch.ray import train_with_ray

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    other = cluster.add_node(num_cpus=1)
    told: list[str] = []

    def drain(_: Record) -> None:
        if not told:
            told.append(other.node_id)
            ray = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "drain-node"]
            why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test"]
            subprocess.run(
                [
                    *ray,
                    "--address",
                    cluster.address,
                    "--node-id",
                    other.node_id,
                    *why,
                    "--deadline-remaining-seconds",
                    "500",
                ],
                check=True,
                capture_output=True,
            )

    loop = {"workers": 2, "steps": 1_000_000, "eval_every": 1_000_000, "checkpoint_every": 1_000_000}
    config = config_of(Path(root), Path(out), train=loop)
    saved: list[int] = []

    def stop() -> bool:
        saved.append(step_of(newest_checkpoint(config.run_dir / "checkpoints")))
        return saved[-1] > 0

    try:
        result = train_with_ray(config, address=cluster.address, should_stop=stop, on_record=drain)
        print(json.dumps({"finished": result.finished, "saved": saved[-1] > 0, "further": result.step >= saved[-1]}))
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
