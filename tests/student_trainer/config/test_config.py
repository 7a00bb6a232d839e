"""Configs: what is accepted, and how what is not is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from potstill.cache.errors import InvalidInput, SpecMismatch
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.config.resume import check_continues
from tests.support.tiny_runs import config_of

ROOT, OUT = Path("/cache"), Path("/run")

TOML = """
[data]
cache = "cache"
corpus = "docs"
held_out = 64

[[teachers]]
name = "big"
weight = 3.0

[[teachers]]
name = "small"
source = "service"
url = "http://127.0.0.1:8700"

[student]
config = { model_type = "llama", hidden_size = 128 }

[train]
out = "runs/first"
steps = 1000
schedule = "wsd"
"""


def test_a_file_is_read_and_written_back(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(TOML)
    config = TrainConfig.from_toml(file)
    assert config.weights() == (0.75, 0.25)
    assert config.data.held_out == 64
    assert config.train.batch_rows == 32
    assert TrainConfig.of(config.to_json()) == config
    assert TrainConfig.from_toml(file, out="elsewhere").train.out == "elsewhere"


def test_folders_become_absolute_and_names_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = config_of(Path("cache"), Path("run"), student={"config": None, "checkpoint": "org/model"}).absolute()
    assert (config.data.cache, config.train.out) == (str(tmp_path / "cache"), str(tmp_path / "run"))
    assert config.student.checkpoint == "org/model"
    assert config_of(Path("s3:"), OUT, data={"cache": "s3://bucket/x"}).absolute().data.cache == "s3://bucket/x"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"step": 5}}, r"^train\.step is unknown; known are alpha, .*, out, steps, batch_rows"),
        ({"train": {"held_out": 5}}, r"^train\.held_out is unknown; held_out belongs to \[data\]$"),
        ({"teachers": [{"name": "a", "steps": 5}]}, r"^teachers\.0\.steps is unknown; steps belongs to \[train\]$"),
        ({"data": {"missing": "ask"}}, r"data\.missing is 'ask', but teacher 'fake' has no url; set teachers\.url$"),
        ({"train": {"alpha": 1.5}}, r"^train\.alpha is 1\.5: .*less than or equal to 1$"),
        ({"train": {"steps": 0}}, r"^train\.steps is 0: .*greater than or equal to 1$"),
        ({"train": {"steps": True}}, r"^train\.steps is True"),
        ({"train": {"lr": float("nan")}}, r"^train\.lr is nan"),
        ({"train": {"schedule": "linear"}}, r"^train\.schedule is 'linear'"),
        ({"train": {"workers": 9}}, r"batch_rows 8 is less than one row for each of 9 workers"),
        ({"train": {"workers": 0}}, r"^train\.workers is 0: it is neither a whole number above 0 nor two of them"),
        ({"train": {"workers": [0, 2]}}, r"^train\.workers is \[0, 2\]: it is neither"),
        ({"train": {"workers": [3, 1]}}, r"workers \[3, 1\] are not the least and the most; turn them round"),
        ({"train": {"workers": [1, 9]}}, r"batch_rows 8 is less than one row for each of 9 workers"),
        ({"data": {"held_out": 1.5}}, r"whole number of rows, or a share below 1"),
        ({"data": {"held_out": -1}}, r"^data\.held_out"),
        ({"teachers": []}, r"train\.alpha is 0\.5 but there is no teacher"),
        ({"teachers": [], "train": {"alpha": 0.0, "alm": 0.1}}, r"train\.alm is 0\.1 but there is no teacher"),
        ({"teachers": [{"name": "a"}, {"name": "a"}]}, r"different names"),
        ({"teachers": [{"name": "a", "weight": 0}]}, r"^teachers\.0: weight is never over 0; leave the teacher out$"),
        ({"teachers": [{"name": "a", "weight": [[5, 1], [2, 1]]}]}, r"^teachers\.0: .*pairs whose steps rise$"),
        (
            {"teachers": [{"name": "a", "weight": [[0, 1], [9, 0]]}, {"name": "b", "weight": [[0, 1], [5, 0]]}]},
            r"^config: the weights of all teachers are 0 at step 9$",
        ),
        (
            {"teachers": [{"name": "a", "k": 4}], "train": {"dense": True}},
            r"train\.dense takes all ids, but .* is 4 for",
        ),
        ({"train": {"dense": True, "loss": "draws"}}, r"dense does not go with loss 'draws'"),
        ({"teachers": [{"name": "a", "url": "http://x"}]}, r"the url of teacher 'a' is not used: set its source"),
        ({"teachers": [{"name": "a", "source": "service"}]}, r"^teachers\.0: source = \"service\" needs a url$"),
        ({"student": {"checkpoint": "x"}}, r"exactly one of preset, config and checkpoint"),
        ({"student": {"preset": "lokilm-tiny"}}, r"exactly one of preset, config and checkpoint"),
        ({"student": {"config": {"hidden_size": 4}}}, r"model_type"),
        ({"student": {"layers": [0]}}, r"layers are taken from a checkpoint; give one in place of a config"),
        ({"student": {"config": None, "checkpoint": "x", "layers": []}}, r"student\.layers"),
    ],
)
def test_a_bad_value_is_named_with_its_limit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as error:
        config_of(ROOT, OUT, **changes)
    assert "\n" not in str(error.value)


def test_more_readers_than_are_read_ahead_harm_nothing_and_are_in_configs_of_earlier_runs() -> None:
    assert config_of(ROOT, OUT, data={"readers": 8, "prefetch": 2}).data.readers == 8


def test_cross_entropy_alone_needs_no_teacher() -> None:
    assert config_of(ROOT, OUT, teachers=[], train={"alpha": 0}).weights() == ()


@pytest.mark.parametrize(("text", "told"), [("not toml", "not TOML: Expected"), (None, "there is no file")])
def test_an_unreadable_file_is_named(tmp_path: Path, text: str | None, told: str) -> None:
    file = tmp_path / "run.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InvalidInput, match=r"run\.toml") as error:
        TrainConfig.from_toml(file)
    assert told in str(error.value)


def test_a_run_goes_on_under_what_does_not_change_it() -> None:
    before = config_of(ROOT, OUT)
    changed = {"steps": 99, "checkpoint_every": 1, "workers": 2, "micro_batch_rows": 1}
    moved = config_of(Path("/moved"), Path("/moved"), train={**changed, "out": "/moved"})
    check_continues(moved, before)
    check_continues(before, config_of(ROOT, OUT, train={"workers": [1, 3], "worker_runtime_env": {"env_vars": {}}}))
    assert {name: getattr(moved.train, name) for name in changed} == changed
    with pytest.raises(SpecMismatch, match=r"^train\.lr"):
        check_continues(
            config_of(Path("/moved"), Path("/moved"), train={**changed, "out": "/moved", "lr": 5.0}), before
        )


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"train": {"lr": 5.0}}, r"^train\.lr is 5\.0, but it was 0\.01 when the run in"),
        ({"train": {"seed": 5}}, r"^train\.seed"),
        ({"student": {"config": {"model_type": "llama", "hidden_size": 64}}}, r"^student\.config\."),
        ({"teachers": [{"name": "fake"}, {"name": "new"}]}, r"^teachers\.1\."),
        ({"data": {"corpus": "other"}}, r"^data\.corpus is 'other'"),
        ({"data": {"eval_corpora": ["judge"]}}, r"^data\.eval_corpora\.0 is 'judge', but it was not there when"),
    ],
)
def test_a_run_does_not_go_on_as_another(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(SpecMismatch, match=key):
        check_continues(config_of(ROOT, OUT, **changes), config_of(ROOT, OUT))


def test_importing_the_package_and_its_commands_is_cheap() -> None:
    code = (
        "import sys, potstill.student_trainer.commands.train, potstill.student_trainer.commands.evaluate;"
        "print([m for m in ('torch', 'transformers', 'ray', 'zarr', 'pydantic', 'numpy') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
