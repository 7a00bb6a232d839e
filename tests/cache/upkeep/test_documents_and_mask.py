"""Documents and the loss mask as `inspect` shows them and `verify` checks them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from potstill.cache import Cache
from potstill.cache.corpus.ingest import IngestPlan, ingest_rows
from potstill.cache.corpus.seal import CorpusSpec
from potstill.cache.corpus.spool import SourceRow
from potstill.cache.store.record import group_metadata
from potstill.cache.upkeep.integrity import check_cache
from tests.support.command_line import run
from tests.support.corpora import byte_tokenizer, make_corpus

FILES = {"tokenizer_config.json": '{"eos_token": "."}'}


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """A cache with the corpus `docs`, which has documents, and `masked`, of which 3 of 8 targets are to be learnt."""
    cache, _ = make_corpus(tmp_path / "c", texts=["a" * 60, "b"])
    masked = [SourceRow(np.arange(4, dtype=np.uint32), taught=np.arange(4) >= n, ends_document=True) for n in (2, 3)]
    ingest_rows(cache.root, "masked", masked, byte_tokenizer(), IngestPlan(), tokenizer_files=FILES)
    ingest_rows(cache.root, "rows", [np.arange(4, dtype=np.uint32)], byte_tokenizer(), IngestPlan())
    return cache


def problems(cache: Cache) -> list[str]:
    return [problem for found in check_cache(cache.fresh().root, decode=True) for problem in found.problems]


def test_inspect_shows_documents_and_the_share_that_is_learnt(cache: Cache, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", cache.root.url, "--json") == 0
    found = json.loads(capsys.readouterr().out)["corpora"]
    shown = {name: (about["documents"], about["taught_positions"]) for name, about in found.items()}
    assert shown == {"docs": (2, 61), "masked": (2, 3), "rows": (None, 4)}
    assert run("inspect", cache.root.url) == 0
    told = capsys.readouterr().out
    assert "37.5%" in told


@pytest.mark.parametrize("name", ["loss_mask", "document_rows", "tokenizer_files"])
def test_verify_finds_a_flipped_bit_in_each(cache: Cache, name: str) -> None:
    assert problems(cache) == []
    (file,) = (path for path in Path(cache.root.url).glob(f"corpora/masked/*/{name}/c/**/*") if path.is_file())
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert any(f"{name}/c/0" in problem for problem in problems(cache))


def test_verify_finds_a_mask_that_the_seal_does_not_mean(cache: Cache) -> None:
    spec = cache.corpus("masked").spec
    record = {each.name: getattr(spec, each.name) for each in dataclasses.fields(CorpusSpec)}
    seal = Path(cache.root.url) / "corpora" / "masked" / "zarr.json"
    seal.write_bytes(group_metadata("corpus", {**record, "num_taught": 4}))
    assert problems(cache) == ["corpora/masked: the loss mask leaves 3 targets, the seal says 4"]
