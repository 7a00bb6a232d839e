"""Tokenizers named as on the Hugging Face hub, from a local copy of it: there is no network in tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from potstill.clients.cli import main
from tests.support.corpora import byte_tokenizer
from tests.support.processes.forked import Forked

REVISION = "0" * 40


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A `HF_HOME` with one model, laid out as the hub's own library does."""
    model = tmp_path / "hf" / "hub" / "models--some--small"
    snapshot = model / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(REVISION)
    byte_tokenizer().save(str(snapshot / "tokenizer.json"))
    return tmp_path / "hf"


def ingest_in(folder: Path, words: list[str]) -> int:
    assert "huggingface_hub" not in sys.modules
    os.chdir(folder)
    return main(words)


def ingest(folder: Path, hub: Path, tokenizer: str) -> subprocess.CompletedProcess[str]:
    # In a process of its own: the hub's library reads its settings when it is imported.
    (folder / "text.txt").write_text("some words " * 9)
    words = ["ingest", "text.txt", "--cache", "cache", "--corpus", "docs", "--tokenizer", tokenizer]
    environment = {**os.environ, "HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"}
    with Forked(ingest_in, folder, words, environment=environment) as process:
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode is not None
        return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)


def test_a_tokenizer_is_named_as_on_the_hub(tmp_path: Path, hub: Path) -> None:
    done = ingest(tmp_path, hub, "some/small")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("corpus docs: 99 positions in 1 row and 1 shard from 1 document of 1 file")


@pytest.mark.parametrize("name", ["some/other", "small", "a b", "some/small/file"])
def test_a_name_that_cannot_be_had_is_one_line(tmp_path: Path, hub: Path, name: str) -> None:
    done = ingest(tmp_path, hub, name)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"invalid_input: no tokenizer at '{name}', and tokenizer.json of '{name}' cannot")
    assert "give a tokenizer.json, a folder that holds one, or a model's name" in done.stderr
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("path", ["./some/small", "tokenizer.json", "/some/small"])
def test_a_path_is_not_looked_for_on_the_hub(tmp_path: Path, hub: Path, path: str) -> None:
    done = ingest(tmp_path, hub, path)
    assert done.stderr.startswith(f"invalid_input: no tokenizer at '{path}': give")
