"""The loop on Ray Train: real workers, really killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from benchmarks.edges.e16_mask_in_training import masked_corpus
from potstill.cache.cache import Cache
from potstill.cache.errors import InvalidInput, NotCommitted
from potstill.student_trainer.metrics.records import Record, read_metrics
from potstill.student_trainer.train.loop import train
from potstill.teacher_service.access.auth import Role
from potstill.teacher_service.access.keys_file import add_key
from potstill.teacher_service.access.middleware import Access
from potstill.teacher_service.access.quotas import Quota
from potstill.teacher_service.settings.service import AccessSettings
from tests.support.fakes import FakeTeacher
from tests.support.processes.servers import hosted, serving_teachers
from tests.support.tiny_runs import STUDENT, config_of, fill, write_cache

# Ray's own: Ray Train copies its Ray Data context to the controller, old settings and all.
pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated:DeprecationWarning:ray.data.context")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache"))


def worker_processes(mark: str) -> list[int]:
    """Ids of the training workers of the Ray that was started under this mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title, environment = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
        except OSError:
            continue  # gone meanwhile
        if b"TrainWorker" in title and f"RAY_OF_THE_TESTS={mark}".encode() in environment:
            found.append(int(folder.name))
    return found


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run) if "loss" in record]


def test_two_workers_train_like_one(root: Path, tmp_path: Path, ray_mark: str) -> None:
    from potstill.student_trainer.launch.ray import train_with_ray

    shown: list[Record] = []
    alone = train(config_of(root, tmp_path / "alone"))
    both = train_with_ray(config_of(root, tmp_path / "two", train={"workers": 2}), on_record=shown.append)
    assert both.finished
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "alone"), atol=1e-4, rtol=0)
    assert alone.held_out is not None
    assert both.held_out is not None
    assert both.held_out.ce == pytest.approx(alone.held_out.ce, abs=1e-4)
    assert both.held_out.tokens == alone.held_out.tokens
    assert shown == read_metrics(tmp_path / "two")
    assert (tmp_path / "two" / "model" / "config.json").exists()


@pytest.mark.slow
def test_two_workers_train_a_mixture_with_a_mask_and_a_prefix_like_one(tmp_path: Path, ray_mark: str) -> None:
    from potstill.student_trainer.launch.ray import train_with_ray

    root = masked_corpus(tmp_path)  # a row of it has no target that is learnt: a whole micro-batch of a worker
    fill(root, "fake")
    write_cache(tmp_path, documents=30, corpus="more")
    corpora = [{"name": "docs", "weight": 0.4}, {"name": "more", "weight": 0.6}]
    data = {"corpus": None, "corpora": corpora, "held_out": 2, "prefix_ids": [1]}
    loop = {"batch_rows": 4, "micro_batch_rows": 1}
    alone = train(config_of(root, tmp_path / "alone", data=data, train=loop))
    both = train_with_ray(config_of(root, tmp_path / "two", data=data, train={**loop, "workers": 2}))
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "alone"), atol=1e-4, rtol=0)
    assert both.tokens == alone.tokens
    assert both.held_out is not None
    assert alone.held_out is not None
    assert both.held_out.tokens == alone.held_out.tokens
    assert both.held_out.ce == pytest.approx(alone.held_out.ce, abs=1e-4)


@pytest.mark.slow
def test_two_workers_balance_experts_over_the_rows_of_both(root: Path, tmp_path: Path, ray_mark: str) -> None:
    from potstill.student_trainer.launch.ray import train_with_ray

    experts = {"num_key_value_heads": 1, "num_local_experts": 4, "output_router_logits": True}
    mixtral = {**STUDENT, **experts, "model_type": "mixtral", "router_aux_loss_coef": 10.0, "initializer_range": 0.5}
    student = {"config": mixtral}
    train(config_of(root, tmp_path / "alone", student=student, train={"steps": 4}))
    train_with_ray(config_of(root, tmp_path / "two", student=student, train={"steps": 4, "workers": 2}))
    for name in ("loss", "router_loss", "grad_norm"):
        alone, two = (
            [record[name] for record in read_metrics(tmp_path / run) if name in record] for run in ("alone", "two")
        )
        assert len(alone) == 4
        np.testing.assert_allclose(two, alone, rtol=1e-4, err_msg=name)


@pytest.mark.slow
def test_a_wish_to_stop_reaches_the_workers_and_the_run_goes_on_alone(
    root: Path, tmp_path: Path, ray_mark: str
) -> None:
    from potstill.student_trainer.launch.ray import train_with_ray

    steps: list[int] = []
    config = config_of(root, tmp_path / "run", train={"workers": 2, "steps": 5000, "eval_every": 5000})
    result = train_with_ray(
        config, should_stop=lambda: bool(steps), on_record=lambda record: steps.append(record["step"])
    )
    assert not result.finished
    assert 0 < result.step < 5000
    assert steps[-1] == result.step
    more = {"steps": result.step + 3, "eval_every": 5000}
    assert train(config_of(root, tmp_path / "run", train=more)).finished
    assert len(losses(tmp_path / "run")) == result.step + 3


@pytest.mark.slow
def test_errors_come_back_as_what_they_are_and_once(
    root: Path, tmp_path: Path, ray_mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the way, a worker reads from a service with a key that is not in the environment of Ray's node."""
    from ray._private.state import actors

    from potstill.student_trainer.launch.ray import train_with_ray

    keys = tmp_path / "keys.toml"
    key = add_key(keys, "trainer", Role.TRAINER, Quota())
    monkeypatch.setenv("KEY_OF_THE_TEST", key)
    before = set(actors())
    wild = {"lr": 1e18, "schedule": "constant", "warmup": 0, "weight_decay": 0.0}
    access = Access.of(AccessSettings(keys_file=str(keys)))
    with serving_teachers(hosted("other", FakeTeacher()), cache=Cache.open(root), access=access) as url:
        data = {"cache": url, "api_key_env": "KEY_OF_THE_TEST"}
        with pytest.raises(InvalidInput, match=r"lower train\.lr"):
            train_with_ray(config_of(root, tmp_path / "wild", train=wild, data=data))
    started = [actors()[each]["ActorClassName"] for each in set(actors()) - before]
    assert sum("TrainWorker" in name for name in started) == 1, f"a restart cannot mend it: {started}"
    assert not [file for folder in (tmp_path / "wild", ray_session()) for file in files_with(folder, key)]
    fill(root, "partial", shards=1)
    before = set(actors())
    with pytest.raises(NotCommitted, match="lacks"):
        train_with_ray(config_of(root, tmp_path / "partial", teachers=[{"name": "partial"}]))
    assert set(actors()) == before, "it is told before any worker starts"


def ray_session() -> Path:
    """The folder of this Ray's logs."""
    import ray._private.worker

    return Path(ray._private.worker.global_worker.node.get_session_dir_path())


def files_with(folder: Path, text: str) -> list[Path]:
    found = [path for path in folder.rglob("*") if path.is_file()]
    assert found
    return [path for path in found if text.encode() in path.read_bytes()]


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_the_result_is_the_same(root: Path, tmp_path: Path, ray_mark: str) -> None:
    from potstill.student_trainer.launch.ray import train_with_ray

    long = {"workers": 2, "steps": 150, "eval_every": 150, "checkpoint_every": 20}
    killed: list[int] = []

    def kill_one(record: Record) -> None:
        if record["step"] >= 30 and not killed:
            killed.append(worker_processes(ray_mark)[0])
            os.kill(killed[0], signal.SIGKILL)

    survived = train_with_ray(config_of(root, tmp_path / "killed", train=long), on_record=kill_one)
    assert len(killed) == 1
    undisturbed = train_with_ray(config_of(root, tmp_path / "whole", train=long))
    assert survived.finished
    assert survived.tokens == undisturbed.tokens
    # Workers on gloo differ in the last bits from run to run, killed or not.
    ours, theirs = losses(tmp_path / "killed"), losses(tmp_path / "whole")
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    assert survived.held_out is not None
    assert undisturbed.held_out is not None
    assert survived.held_out.ce == pytest.approx(undisturbed.held_out.ce, abs=1e-3)
