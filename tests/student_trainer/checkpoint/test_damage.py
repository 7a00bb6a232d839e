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
from potstill.student_trainer.checkpoint.format import load_state
from potstill.student_trainer.checkpoint.whole import newest_checkpoint, save_checkpoint
from potstill.student_trainer.metrics.records import read_metrics
from potstill.student_trainer.models.build import load_student
from potstill.student_trainer.train.loop import train
from potstill.student_trainer.train.run import evaluate_run
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
OLDER, NEWEST = "step-00000005", "step-00000010"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def trained(root: Path) -> Path:
    """A run of ten steps with the checkpoints 5 and 10; to be copied."""
    train(config_of(root, root.parent / "run"))
    return root.parent / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


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


def test_the_files_are_all_that_a_checkpoint_has(run: Path) -> None:
    newest = run / "checkpoints" / NEWEST
    assert {str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file()} == set(FILES)


@pytest.mark.parametrize("how", ["flipped", "short", "empty", "missing"])
@pytest.mark.parametrize("name", FILES)
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


def test_a_run_goes_on_from_the_good_one_to_the_same_end(root: Path, trained: Path, run: Path) -> None:
    damaged(run / "checkpoints" / NEWEST / "model" / "model.safetensors", "flipped")
    longer = {"train": {"steps": 12, "checkpoint_every": 6, "schedule_steps": 10}}
    train(config_of(root, run, **longer))
    shutil.copytree(trained, run.parent / "undisturbed")
    train(config_of(root, run.parent / "undisturbed", **longer))
    ours, theirs = (load_file(each / "model" / "model.safetensors") for each in (run, run.parent / "undisturbed"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == ["step-00000006", "step-00000012"], "the damaged one went with the first that was good"
    assert [record["step"] for record in read_metrics(run) if "loss" in record] == list(range(1, 13))


def test_without_a_good_one_the_run_ends_and_names_all(root: Path, run: Path) -> None:
    for step in (OLDER, NEWEST):
        damaged(run / "checkpoints" / step / "optimizer.pt", "short")
    with pytest.raises(CorruptSegment, match=f"{NEWEST}.*optimizer.*{OLDER}.*another train.out") as caught:
        train(config_of(root, run, train={"steps": 12}))
    assert "\n" not in caught.value.detail


def test_a_finished_run_is_evaluated_without_its_checkpoints(run: Path) -> None:
    before = evaluate_run(run)
    for step in (OLDER, NEWEST):
        damaged(run / "checkpoints" / step / "optimizer.pt", "short")
    assert evaluate_run(run) == before
    shutil.rmtree(run / "model")
    with pytest.raises(CorruptSegment):
        evaluate_run(run)


def test_a_checkpoint_of_an_earlier_version_is_read(root: Path, run: Path) -> None:
    for step in (OLDER, NEWEST):
        unhashed(run / "checkpoints" / step)
    assert train(config_of(root, run, train={"steps": 12})).finished


@pytest.mark.parametrize("size", [0, 1000, 4000, 20_000])
def test_a_full_disk_is_one_line_and_the_older_ones_stay(run: Path, size: int) -> None:
    folder = run / "checkpoints"
    sizes = sorted(path.stat().st_size for path in (folder / NEWEST).rglob("*") if path.is_file())
    assert size < sizes[-1], "or the limit would never be met"
    model = load_student(folder / NEWEST / "model")
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.ones(1, 2, dtype=torch.int64)).logits.sum().backward()
    optimizer.step()
    state = replace(load_state(folder / NEWEST), step=11)
    with files_of_at_most(size), pytest.raises(StoreError, match=r"step-00000011.*could not be written") as caught:
        save_checkpoint(folder, model, optimizer.state_dict(), state, keep=2)
    assert len(caught.value.detail.splitlines()) == 1
    assert sorted(path.name for path in folder.iterdir()) == [OLDER, NEWEST]
    assert newest_checkpoint(folder) == folder / NEWEST


def test_an_optimizer_that_the_disk_does_not_take_is_one_line(run: Path) -> None:
    """Its file is the largest, so that the model's is there already."""
    folder = run / "checkpoints"
    model = load_student(folder / NEWEST / "model")
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.ones(1, 2, dtype=torch.int64)).logits.sum().backward()
    optimizer.step()
    largest = (folder / NEWEST / "model" / "model.safetensors").stat().st_size
    limit = files_of_at_most(largest + 1000)
    with limit, pytest.raises(StoreError, match=r"optimizer\.pt.*|File too large"):
        save_checkpoint(folder, model, optimizer.state_dict(), replace(load_state(folder / NEWEST), step=11), keep=2)
    assert newest_checkpoint(folder) == folder / NEWEST


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
