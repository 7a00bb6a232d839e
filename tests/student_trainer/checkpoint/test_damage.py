"""Damaged checkpoints and full disks: what is not as it was written is never trained on."""

from __future__ import annotations

import logging
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from potstill.cache.errors import CorruptSegment, StoreError
from potstill.student_trainer.checkpoint.checkpoints import checkpoints_of, load_model
from potstill.student_trainer.checkpoint.folders import newest_checkpoint
from potstill.student_trainer.checkpoint.format import load_state
from potstill.student_trainer.metrics.records import read_metrics
from potstill.student_trainer.parallel.fsdp import FsdpGroup
from potstill.student_trainer.parallel.group import Group
from potstill.student_trainer.train.loop import train
from potstill.student_trainer.train.optimizer import make_optimizer
from potstill.student_trainer.train.run import evaluate_run
from tests.support.processes.training_workers import process_group
from tests.support.tiny_runs import config_of, unhashed, write_cache

pytestmark = pytest.mark.usefixtures("one_torch_thread")

FILES = (
    "model/config.json",
    "model/generation_config.json",
    "model/model.safetensors",
    "optimizer.pt",
    "state.json",
    ".complete",
)
SHARD = "shards/shard-00001-model-00001-of-00001.safetensors"
SHARDED = tuple(SHARD if name == "model/model.safetensors" else name for name in FILES if name != "optimizer.pt")
FILES_OF = {"whole": FILES, "sharded": SHARDED}
EACH = [(kind, name) for kind, names in FILES_OF.items() for name in names]
OLDER, NEWEST = "step-00000005", "step-00000010"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def groups() -> Iterator[dict[str, Group]]:
    """A group of one worker for each kind of checkpoint."""
    with process_group():
        yield {"whole": Group(device=torch.device("cpu")), "sharded": FsdpGroup(device=torch.device("cpu"))}


@pytest.fixture(scope="module")
def trained(root: Path, groups: dict[str, Group]) -> dict[str, Path]:
    """Runs of ten steps with the checkpoints 5 and 10, by their kind; to be copied."""
    for kind, group in groups.items():
        train(config_of(root, root.parent / kind), group)
    return {kind: root.parent / kind for kind in groups}


@pytest.fixture(params=["whole", "sharded"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def run(trained: dict[str, Path], kind: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained[kind], tmp_path / "run"))


def damaged(file: Path, how: str) -> None:
    whole = file.read_bytes()
    if how == "missing":
        file.unlink()
    elif how == "flipped":
        file.write_bytes(whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 4]) + whole[len(whole) // 2 + 1 :])
    else:
        file.write_bytes(whole[: {"empty": 0, "short": len(whole) // 2}[how]])


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk that takes no more than so many bytes of a file, to this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_files_are_all_that_a_checkpoint_has(run: Path, kind: str) -> None:
    newest = run / "checkpoints" / NEWEST
    assert {str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file()} == set(FILES_OF[kind])


@pytest.mark.parametrize("how", ["flipped", "short", "empty", "missing"])
@pytest.mark.parametrize(("kind", "name"), EACH)
def test_the_one_before_is_chosen_and_the_damaged_one_named(
    run: Path, name: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = run / "checkpoints"
    damaged(folder / NEWEST / name, how)
    with caplog.at_level(logging.WARNING, "potstill.student_trainer"):
        assert newest_checkpoint(folder) == folder / OLDER
    if (name, how) == (".complete", "missing"):  # then it is none
        assert not caplog.records
        return
    (record,) = caplog.records
    told = record.getMessage()
    assert "\n" not in told
    assert f"{NEWEST}' is damaged" in told
    assert "that of step 5" in told


def test_a_run_goes_on_from_the_good_one_to_the_same_end(
    root: Path,
    trained: dict[str, Path],
    run: Path,
    kind: str,
    groups: dict[str, Group],
    caplog: pytest.LogCaptureFixture,
) -> None:
    damaged(run / "checkpoints" / NEWEST / FILES_OF[kind][2], "flipped")
    longer = {"train": {"steps": 12, "checkpoint_every": 6, "schedule_steps": 12}}
    begun: list[int] = []
    train(config_of(root, run, **longer), groups[kind], on_begin=begun.append)
    assert begun == [5]
    assert any("at step 6: the cosine schedule was of 10 steps and is of 12" in told for told in caplog.messages)
    shutil.copytree(trained[kind], run.parent / "undisturbed")
    shutil.rmtree(run.parent / "undisturbed" / "checkpoints" / NEWEST)
    train(config_of(root, run.parent / "undisturbed", **longer), groups[kind])
    ours, theirs = (load_file(each / "model" / "model.safetensors") for each in (run, run.parent / "undisturbed"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == ["step-00000006", "step-00000012"], "the damaged one went with the first that was good"
    assert [record["step"] for record in read_metrics(run) if "loss" in record] == list(range(1, 13))


def test_without_a_good_one_the_run_ends_and_names_all(root: Path, run: Path, kind: str) -> None:
    for step in (OLDER, NEWEST):
        damaged(run / "checkpoints" / step / FILES_OF[kind][2], "short")
    with pytest.raises(CorruptSegment, match=f"{NEWEST}.*safetensors.*{OLDER}.*another train.out") as caught:
        train(config_of(root, run, train={"steps": 12}))
    assert "\n" not in caught.value.detail


def test_a_finished_run_is_evaluated_without_its_checkpoints(run: Path) -> None:
    before = evaluate_run(run)
    model = shutil.move(run / "model", run / "of-another-name")
    assert evaluate_run(run) == before, "the newest checkpoint is that model"
    moved = Path(shutil.move(run, run.with_name("elsewhere")))
    assert evaluate_run(moved) == before, "and the summary is what lies beside it"
    shutil.move(moved, run)
    for step in (OLDER, NEWEST):
        damaged(run / "checkpoints" / step / "state.json", "short")
    shutil.move(model, run / "model")
    assert evaluate_run(run) == before
    shutil.rmtree(run / "model")
    with pytest.raises(CorruptSegment):
        evaluate_run(run)


@pytest.mark.parametrize("kind", ["whole"])
def test_a_checkpoint_of_an_earlier_version_is_read(root: Path, run: Path) -> None:
    for step in (OLDER, NEWEST):
        unhashed(run / "checkpoints" / step)
    assert train(config_of(root, run, train={"steps": 12})).finished


@pytest.mark.parametrize(("kind", "name"), EACH)
def test_a_full_disk_is_one_line_and_the_older_ones_stay(
    root: Path, run: Path, kind: str, name: str, groups: dict[str, Group]
) -> None:
    """The disk takes all but the last byte of a file, and no more of another."""
    folder, group = run / "checkpoints", groups[kind]
    checkpoints = checkpoints_of(folder, group, keep=2)
    model = load_model(folder / NEWEST)
    group.wrap(model)
    optimizer = make_optimizer(model, config_of(root, run).train)
    model(input_ids=torch.ones(1, 2, dtype=torch.int64)).logits.sum().backward()
    optimizer.step()
    size = (folder / NEWEST / name).stat().st_size
    state = replace(load_state(folder / NEWEST), step=11)

    def save() -> None:
        checkpoints.save(model, optimizer, state)
        checkpoints.wait()

    with files_of_at_most(size - 1), pytest.raises(StoreError, match=r"step-00000011.*could not be written") as caught:
        save()
    assert len(caught.value.detail.splitlines()) == 1
    assert sorted(path.name for path in folder.iterdir()) == [OLDER, NEWEST]
    assert newest_checkpoint(folder) == folder / NEWEST


@pytest.mark.parametrize("kind", ["whole"])
def test_what_killed_writers_left_goes_at_the_next_start(root: Path, run: Path) -> None:
    folder = run / "checkpoints"
    shutil.copytree(folder / NEWEST, folder / ".partial-step-00000012")
    shutil.copytree(folder / NEWEST, folder / "step-00000012")
    (folder / "step-00000012" / ".complete").unlink()
    (run / ".partial-model").mkdir()
    (run / ".partial-config.json").touch()
    train(config_of(root, run, train={"steps": 11}))
    assert sorted(path.name for path in folder.iterdir()) == [NEWEST, "step-00000011"]
    assert not list(run.glob(".partial-*"))
