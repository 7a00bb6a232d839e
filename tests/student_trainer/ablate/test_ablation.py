"""`potstill ablate` on real runs of small students: its table, and what becomes of runs that fail or are killed."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.cache.errors import InvalidInput, SpecMismatch
from potstill.clients.cli import main
from potstill.student_trainer.ablate.grid import GridConfig
from potstill.student_trainer.ablate.outcome import Outcome, PerDocument, load_outcome
from potstill.student_trainer.ablate.runs import outcomes_there, plan_runs
from tests.support.tiny_runs import STUDENT, fill, write_cache

BASE = """
[data]
cache = "{root}"
corpus = "docs"
held_out = 20

[[teachers]]
name = "fake"

[student]
config = {student}

[train]
out = "unused"
steps = {steps}
batch_rows = 8
lr = 1e-2
eval_every = {every}
checkpoint_every = {every}
"""
CELLS = """
[cells]
ce = { train.alpha = 0 }
kd = { train.alpha = 1.0 }
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache"), documents=60)


def write_grid(root: Path, folder: Path, cells: str = CELLS, *, steps: int = 4, every: int = 2) -> Path:
    student = "{" + ", ".join(f"{key} = {json.dumps(value)}" for key, value in STUDENT.items()) + "}"
    base, grid = folder / "student.toml", folder / "grid.toml"
    base.write_text(BASE.format(root=root, student=student, steps=steps, every=every))
    grid.write_text(
        f'config = "{base}"\nout = "{folder / "ablation"}"\nbaseline = "ce"\nseeds = [0, 1]\nresamples = 100\n{cells}'
    )
    return grid


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_cells_are_trained_paired_and_compared_and_not_mixed_with_others(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = write_grid(root, tmp_path)
    assert main(["ablate", str(grid), "--no-ray", "--json"]) == 0
    first = told(capsys)
    rows = {row["cell"]: row for row in first["rows"]}
    assert list(rows) == ["ce", "kd"]
    assert first["documents"] >= 10
    assert set(rows["kd"]["differences"]) == {"loss", "kl fake", "top1 fake", "top1", "ece", "overconfidence"}
    assert rows["kd"]["differences"]["kl fake"]["value"] < 0, "it was taught by the teacher"
    # Within a seed both begin with the same student.
    curves = {
        (cell, seed): outcome.curve[0].loss
        for cell in rows
        for seed in (0, 1)
        if (outcome := load_outcome(tmp_path / "ablation", cell, seed)) is not None
    }
    assert curves["ce", 0] == curves["kd", 0] != curves["ce", 1] == curves["kd", 1]
    summary = json.loads((tmp_path / "ablation/runs/kd/0/summary.json").read_text())
    outcome = load_outcome(tmp_path / "ablation", "kd", 0)
    assert outcome is not None
    loss = outcome.measures["loss"]
    assert np.sum(loss.sums) / sum(loss.counts) == pytest.approx(summary["held_out"]["ce"], rel=1e-5)
    assert (tmp_path / "ablation/report.html").exists()
    # Called again it has nothing to train, and says the same.
    assert main(["ablate", str(grid), "--no-ray", "--json"]) == 0
    assert told(capsys) == first
    changed = write_grid(root, tmp_path, CELLS.replace("1.0", "0.5"))
    assert main(["ablate", str(changed), "--no-ray"]) == 1
    assert "train.alpha is 0.5, but it was 1.0 when the run in " in capsys.readouterr().err


def test_cells_that_cannot_run_are_all_named_before_the_first_starts(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = """
    [cells]
    ce = { train.alpha = 0 }
    wide = { teachers.fake.k = 40 }
    drawn = { train.loss = "draws" }
    chunks = { train.alm = 0.25 }
    apart = { data.held_out_seed = 3 }
    small = { student.config.vocab_size = 7 }
    begun = { data.prefix_ids = [3] }
    seeded = { train.seed = 7 }
    """
    assert main(["ablate", str(write_grid(root, tmp_path, cells)), "--no-ray"]) == 1
    line = capsys.readouterr().err
    assert line.startswith(
        "invalid_input: 7 of 8 cells cannot run: wide: teachers.k is 40 for 'fake', but the cache holds"
    )
    assert "drawn: " in line
    assert "chunks: train.alm is 0.25, but no teacher's targets of corpus 'docs' are made of another" in line
    assert "apart: it holds out other rows than the run that it changes" in line
    assert "small: student vocab_size is 7" in line
    assert "begun: its student sees [3] in front of each row, but is judged with []; set data.prefix_ids" in line
    assert "seeded: train.seed of a cell is not used" in line
    assert line.count("\n") == 1
    assert not (tmp_path / "ablation").exists()


def test_a_run_that_fails_is_told_in_its_row_and_the_others_go_on(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = "[cells]\nnan = { train.lr = 1e30 }\nce = { train.alpha = 0 }\n"
    assert main(["ablate", str(write_grid(root, tmp_path, cells)), "--no-ray"]) == 1
    out = capsys.readouterr().out
    assert "nan (0 of 2)" in out
    assert "nan, seed 0: invalid_input: " in out
    assert load_outcome(tmp_path / "ablation", "ce", 1) is not None


def test_cells_that_learn_from_other_rows_are_refused(tmp_path: Path) -> None:
    root = write_cache(tmp_path, documents=40)
    fill(root, "half", shards=2)
    grid = write_grid(root, tmp_path, "[cells]\nce = { train.alpha = 0 }\nfewer = { teachers = ['fake'] }\n")
    base = tmp_path / "student.toml"
    more = "missing = 'skip'\n[[teachers]]\nname = 'half'\n[[teachers]]"
    base.write_text(base.read_text().replace("\n[[teachers]]", more))
    with pytest.raises(InvalidInput, match="1 of 2 cells cannot run: fewer: it skips other rows for want of targets"):
        plan_runs(GridConfig.from_toml(grid))


@pytest.mark.parametrize(
    ("key", "setting", "told"),
    [
        ("[train]", "schedule_steps = 8", "train.schedule_steps is 8, but it was 4 when"),
        ("[train]", 'save_dtype = "bfloat16"', "train.save_dtype is 'bfloat16', but it was None when"),
        ("[[teachers]]", "k = 2", "teachers.0.k is 2, but it was"),
    ],
)
def test_what_changes_an_outcome_is_the_same_for_runs_that_ended_and_those_to_come(
    root: Path, tmp_path: Path, key: str, setting: str, told: str
) -> None:
    grid = write_grid(root, tmp_path, "[cells]\nce = { train.alpha = 0, teachers.fake.k = 4 }\nkd = {}\n")
    plan = GridConfig.from_toml(grid)
    first = plan_runs(plan)[0]
    Outcome(
        cell=first.cell,
        seed=first.seed,
        config=first.config.to_json(),
        base=first.base.to_json(),
        tokens=0,
        seconds=0.0,
        measures={"loss": PerDocument([], [])},
        asked="",
        notes=[],
        curve=[],
    ).save(Path(plan.out))
    assert list(outcomes_there(plan_runs(plan), Path(plan.out))) == [("ce", 0)]
    base = tmp_path / "student.toml"
    base.write_text(base.read_text().replace(f"{key}\n", f"{key}\n{setting}\n"))
    with pytest.raises(SpecMismatch, match=re.escape(told)):
        outcomes_there(plan_runs(plan), Path(plan.out))


def ablate(grid: Path, *more: str) -> list[str]:
    command = "from potstill.clients.cli import main; raise SystemExit(main())"
    return [sys.executable, "-c", command, "ablate", str(grid), "--json", *more]


def written(folder: Path) -> int:
    """Bytes of all metrics of an ablation, and its outcomes: more of them are progress."""
    files = [*folder.glob("ablation/runs/*/*/metrics.jsonl"), *folder.glob("ablation/outcomes/*/*.json")]
    return sum(file.stat().st_size for file in files)


def killed_at_random(grid: Path, choose: random.Random) -> bool:
    """Start an ablation, and kill all of it some seconds after it went on; False if it came to its end before."""
    process = subprocess.Popen(ablate(grid), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    before = written(grid.parent)
    while written(grid.parent) == before and process.poll() is None:
        time.sleep(0.1)
    time.sleep(choose.uniform(0, 4))
    ended = process.poll() is not None
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return not ended


def without_times(text: str) -> Any:
    found = json.loads(text)
    for row in found["rows"]:
        row["seconds"] = 0.0
        row["reached"] = row["reached"] and {**row["reached"], "seconds": 0.0}
    return found


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_ten_times_it_ends_with_the_table_of_an_undisturbed_one(root: Path, tmp_path: Path) -> None:
    grids = []
    for name in ("killed", "undisturbed"):
        (tmp_path / name).mkdir()
        grids.append(write_grid(root, tmp_path / name, steps=1500, every=50))
    choose = random.Random(5)
    assert [killed_at_random(grids[0], choose) for _ in range(10)] == [True] * 10, "it came to its end: take more steps"
    tables = [subprocess.run(ablate(each), capture_output=True, text=True, check=False) for each in grids]
    assert [each.returncode for each in tables] == [0, 0], tables
    first, second = (without_times(each.stdout) for each in tables)
    assert first == second
