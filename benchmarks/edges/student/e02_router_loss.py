"""A Mixtral student with a router loss coefficient of 10 and of 0: does training differ?"""

from pathlib import Path

from potstill.cache.errors import PotstillError
from potstill.student_trainer.metrics.records import read_metrics
from potstill.student_trainer.train.loop import train
from tests.support.tiny_runs import STUDENT, config_of, write_cache


def main() -> None:
    """Train two runs of three steps and print their last losses."""
    root = write_cache(Path.cwd(), documents=20)
    experts = {**STUDENT, "model_type": "mixtral", "num_key_value_heads": 1, "num_local_experts": 4}
    found = []
    for coefficient in (0.0, 10.0):
        out = Path(f"run-{coefficient}").absolute()
        keys = {**experts, "output_router_logits": True, "router_aux_loss_coef": coefficient}
        try:
            train(config_of(root, out, data={"held_out": 2}, student={"config": keys}, train={"steps": 3}))
        except PotstillError as error:
            print(f"refused: {error}"[:100])
            return
        found.append([record["ce"] for record in read_metrics(out) if "ce" in record][-1])
    same = "the same training" if found[0] == found[1] else "training differs"
    print(f"cross-entropy {found[0]:.5f} with 0, {found[1]:.5f} with 10: {same}")


if __name__ == "__main__":
    main()
