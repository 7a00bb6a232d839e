"""Runs that go back from loss spikes: what they leave out, what they tell, and that they end as if they had known."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from potstill.cache.cache import Cache
from potstill.cache.errors import FormatError, InvalidInput
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.evaluate.result import finished_before
from potstill.student_trainer.launch.ending import tell_end
from potstill.student_trainer.metrics.progress import showing
from potstill.student_trainer.metrics.records import MetricsFollower, MetricsWriter, Record, read_metrics
from potstill.student_trainer.parallel.group import Group
from potstill.student_trainer.train.loop import train
from potstill.student_trainer.train.rollback import MOST_ROLLBACKS, Spike, SpikeWatch, read_skipped
from potstill.student_trainer.train.run import open_run
from tests.support.tiny_runs import config_of, without_times, write_texts_cache

pytestmark = pytest.mark.usefixtures("one_torch_thread")

STEPS = 20


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of one sentence, and of one document that has nothing to do with it."""
    texts = [" ".join(f"w{1 + i % 6}" for i in range(12))] * 99
    texts.insert(50, " ".join(f"w{47 - (i * i) % 31}" for i in range(12)))
    return write_texts_cache(tmp_path_factory.mktemp("cache"), texts)


def config(root: Path, out: Path, **loop: object) -> TrainConfig:
    settings = {"steps": STEPS, "alpha": 0.0, "batch_rows": 4, "lr": 3e-2, "schedule": "constant", "seed": 9}
    settings |= {"rollback_over": 6.0, "rollback_window": 4, "checkpoint_every": 3, "eval_every": STEPS}
    return config_of(root, out, data={"held_out": 0}, teachers=[], train={**settings, **loop})


def stopping_at(step: int) -> Callable[[], bool]:
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == step

    return should_stop


def odd_step(root: Path, out: Path) -> int:
    """The step, from 0, that first meets the other document."""
    corpus = Cache.open(root).corpus("docs")
    [odd] = [row for row in range(len(corpus)) if corpus.row(row).max() > 6]
    with open_run(config(root, out)) as run:
        return next(step for step in range(STEPS) if odd in run.order.rank_slice(step, 0, 1))


def weights(run: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(run / "model" / "model.safetensors")
    return found


def test_a_loss_that_a_schedule_moves_is_no_spike(root: Path, tmp_path: Path) -> None:
    watch = SpikeWatch(config(root, tmp_path / "none"), Group(), step=0)
    for step, (loss, ce) in enumerate([(0.5, 3.0), (0.51, 3.01), (0.5, 3.0), (0.51, 3.01), (2.9, 3.0), (2.9, 3.01)]):
        watch.check(step + 1, {"loss": loss, "ce": ce})
    with pytest.raises(Spike, match="the cross-entropy is 9, after a mean of 3"):
        watch.check(7, {"loss": 2.9, "ce": 9.0})


def test_a_run_goes_back_and_ends_as_if_it_had_known(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = odd_step(root, tmp_path / "none")
    assert 6 < at < STEPS - 2
    shown: list[Record] = []
    back, knew, resumed = (tmp_path / name for name in ("back", "knew", "resumed"))
    result = train(config(root, back), on_record=shown.append)
    assert (result.finished, result.rollbacks) == (True, 1)
    [skipped] = read_skipped(back)
    assert (skipped.batch, skipped.step, len(skipped.rows)) == (at, at + 1, 4)
    records = read_metrics(back)
    assert [record["step"] for record in records if "loss" in record] == list(range(1, STEPS + 1))
    [told] = [record for record in records if "rollback" in record]
    assert told["step"] == at // 3 * 3
    assert told["rollback"]["from_step"] == at + 1
    assert told in shown
    assert json.loads((back / "summary.json").read_text())["rollbacks"] == 1
    again = finished_before(config(root, back))
    assert again is not None
    assert again.rollbacks == 1
    tell_end(again, config(root, back))
    assert (
        f"went back from 1 loss spike; the rows that were left out are in {back / 'skipped.json'}"
        in capsys.readouterr().out
    )

    knew.mkdir()
    shutil.copy(back / "skipped.json", knew)
    train(config(root, knew))
    assert without_times(read_metrics(knew)) == without_times([record for record in records if record is not told])
    # Goes back, and is stopped before the next checkpoint.
    assert not train(config(root, resumed), should_stop=stopping_at(at + 2)).finished
    assert train(config(root, resumed)).rollbacks == 1
    ours, theirs, others = map(weights, (back, knew, resumed))
    assert all(torch.equal(ours[name], theirs[name]) and torch.equal(ours[name], others[name]) for name in ours)


def test_without_the_setting_nothing_is_left_out(root: Path, tmp_path: Path) -> None:
    assert train(config(root, tmp_path / "run", rollback_over=None, rollback_window=100)).rollbacks == 0
    assert not (tmp_path / "run" / "skipped.json").exists()


def test_a_spike_before_the_first_checkpoint_begins_anew(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(config(root, run, checkpoint_every=100)).rollbacks == 1
    records = read_metrics(run)
    assert records[0]["rollback"]["number"] == 1
    assert [record["step"] for record in records if "loss" in record] == list(range(1, STEPS + 1))


def test_a_run_that_cannot_be_helped_ends_with_one_line(root: Path, tmp_path: Path) -> None:
    wild = {"lr": 1e18, "warmup": 0, "checkpoint_every": 1, "weight_decay": 0.0}
    with pytest.raises(InvalidInput, match=f"after {MOST_ROLLBACKS} rollbacks; try a lower train.lr"):
        train(config(root, tmp_path / "run", **wild))
    assert len(read_skipped(tmp_path / "run")) == MOST_ROLLBACKS


def test_a_damaged_list_is_named(root: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "skipped.json").write_text('[{"batch": 1}]')
    with pytest.raises(FormatError, match=r"skipped\.json' cannot be read"):
        train(config(root, tmp_path / "run"))


def test_who_follows_the_records_gets_the_steps_again(tmp_path: Path) -> None:
    def step(number: int) -> Record:
        times = {"tokens_per_second": 1.0, "waiting_share": 0.0, "peak_memory_bytes": 2**30, "seconds": 1.0}
        return {"step": number, "loss": 1.0, **times}

    def back(number: int) -> Record:
        told = {"from_step": 3, "skipped_rows": 4, "number": number, "why": "the loss is 9"}
        return {"step": 1, "rollback": told}

    follower, found = MetricsFollower(tmp_path, after_step=-1), []
    for records in ([step(1), step(2)], [back(1), step(2)], [back(2), step(2), step(3)]):
        writer = MetricsWriter(tmp_path, step=1)
        for record in records:
            writer.write(record)
        writer.close()
        found += follower.read()
    assert found == [step(1), step(2), back(1), step(2), back(2), step(2), step(3)]
    assert MetricsFollower(tmp_path, after_step=3).read() == []
    written = io.StringIO()
    with showing(3, Console(file=written)) as show:
        show(back(1))
    assert written.getvalue() == "back to step 1 from step 3, where the loss is 9; its 4 rows are left out\n"
