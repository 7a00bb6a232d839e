"""The pages of `docs/` and the README, run: every block, in order, against real parts in a scratch folder.

`make test` puts a fake where a page names a model folder, `make test-slow` a tiny Llama in the real vLLM. What is not
run at all says why on the page, and is listed here.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.documentation.blocks import Block, blocks_of
from tests.documentation.page_run import PageRun
from tests.support.corpora import topics
from tests.support.paths import ROOT
from tests.support.processes.s3 import S3Server, s3_server
from tests.support.processes.vllm_server import free_port
from tests.support.tiny_models import make_tiny_llama

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"python", "bash", "toml", "text"}
README_WORDS, README_COLUMNS = 500, 120

NOT_RUN = {
    "it sets a checkout up": 3,
    "it installs packages": 2,
    "it needs a journal, which the page on serving fills": 1,
    "openssl and its certificate are for a machine of your own": 1,
    "its folders are those of a machine that serves": 1,
    "it needs a Docker engine": 1,
    "the tiny model of these pages has no chat template": 1,
    "it needs a Ray cluster": 1,
    "it needs a Kubernetes cluster": 1,
}
"""Why blocks are not run, and how many there are: none is left out silently."""

WITH_CODE = [page for page in PAGES if any(block.language != "text" for block in blocks_of(page))]
each_page = pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders `model` and `another`: small Llamas of one tokenizer, with room for rows of 512 tokens."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("model", "another")):
        make_tiny_llama(folder / name, seed=seed, context=1024)
    return folder


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path, models: Path) -> Path:
    """What the pages take for granted: a model folder or two, and some text."""
    folder = tmp_path / "page"
    (folder / "path").mkdir(parents=True)
    (folder / "path" / "to").symlink_to(models)
    (folder / "book.txt").write_text("\n\n".join(topics(12)), encoding="utf-8")
    (folder / "texts").mkdir()
    for number, text in enumerate(topics(12)):
        (folder / "texts" / f"{number}.txt").write_text(text, encoding="utf-8")
    lines = [json.dumps({"text": text, "source": "pydoc"}) for text in topics(30)[12:]]
    (folder / "pile.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def run_page(page: Path, folder: Path, request: pytest.FixtureRequest, *, fakes: bool) -> None:
    instead = {":8700": f":{free_port()}"}
    environment = {"POTSTILL_PORT": instead[":8700"].removeprefix(":")}
    if page.name == "s3.md":
        server: S3Server = request.getfixturevalue("s3")
        instead["http://127.0.0.1:9000"] = server.endpoint
        server.make_bucket("my-bucket")
    blocks = [block for block in blocks_of(page) if block.language != "text" and block.not_run is None]
    with PageRun(folder, fakes=fakes, instead=instead, environment=environment) as running:
        for block in blocks:
            if block.slow is None or not fakes:
                running.run(block)


@each_page
@pytest.mark.usefixtures("one_torch_thread")
def test_every_block_runs(page: Path, folder: Path, request: pytest.FixtureRequest) -> None:
    run_page(page, folder, request, fakes=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@each_page
def test_every_block_runs_with_the_real_engine(page: Path, folder: Path, request: pytest.FixtureRequest) -> None:
    run_page(page, folder, request, fakes=False)


def all_blocks() -> list[Block]:
    return [block for page in PAGES for block in blocks_of(page)]


def test_what_is_not_run_is_known() -> None:
    found = Counter(block.not_run for block in all_blocks() if block.not_run is not None)
    assert dict(found) == NOT_RUN


def test_every_block_has_a_language_that_is_run_or_is_text() -> None:
    assert [b.place for b in all_blocks() if b.language not in LANGUAGES and b.not_run is None] == []


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= README_WORDS
    assert max(map(len, text.splitlines())) <= README_COLUMNS
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_file_that_a_page_names_is_there() -> None:
    top = "cache|clients|student_trainer|teacher_service|tests|benchmarks|deploy|docs"
    named = re.compile(rf"`((?:{top})/[\w./-]+\.(?:py|md|toml|json|ya?ml))`")
    found = {
        path for page in PAGES for path in named.findall(page.read_text(encoding="utf-8")) if not is_decision(page)
    }
    assert [path for path in sorted(found) if not (ROOT / path).exists()] == []


def is_decision(page: Path) -> bool:
    """Decisions tell of their own time."""
    return page.parent.name == "decisions"
