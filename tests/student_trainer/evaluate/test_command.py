"""`potstill evaluate MODEL`: every number against plain float64, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax, rel_entr
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from potstill.cache.cache import Cache
from potstill.cache.corpus.ingest import IngestPlan, ingest
from potstill.cache.corpus.tokenizer import fingerprint, load_tokenizer
from potstill.cache.store.root import Root
from potstill.cache.types import Fields
from potstill.clients.cli import main
from tests.support.corpora import topics
from tests.support.fakes import FakeTeacher, fake_identity
from tests.support.tiny_models import make_tiny_llama
from tests.support.tiny_runs import fill, write_cache

pytestmark = pytest.mark.usefixtures("one_torch_thread")

K, VOCAB, PREFIX = 6, 512, (0,)
Evaluated = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a cache with a corpus of its tokenizer in two files, and a teacher with whole distributions."""
    folder = tmp_path_factory.mktemp("evaluate")
    model = make_tiny_llama(folder / "model")
    texts = [text[:200] for text in topics(9)]
    texts[1] += " 12 x = 3\n\t\t\u0394\u03b7\u03bc\u03bf \u00e9\n"
    for name, part in (("a", texts[:5]), ("b", texts[5:])):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in part), encoding="utf-8")
    plan = IngestPlan(row_tokens=40, shard_positions=200)
    root = Root.open(folder / "cache", create=True)
    ingest(root, "docs", [folder / "a.jsonl", folder / "b.jsonl"], load_tokenizer(model), plan)
    fill(folder / "cache", "big", fields=Fields(k=K), teacher=teacher(folder))
    fill(folder / "cache", "big", fields=Fields(k=0, dense=True), teacher=teacher(folder))
    return folder


def teacher(folder: Path) -> FakeTeacher:
    sha256 = fingerprint(load_tokenizer(folder / "model"))
    identity = fake_identity(vocab_size=VOCAB, tokenizer_sha256=sha256, model="big")
    return FakeTeacher(replace(identity, prefix_ids=PREFIX))


def in_float64(folder: Path) -> list[dict[str, NDArray[np.float64]]]:
    """Measures of each document, [positions] of each name; NaN where there is no label."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64).eval()
    corpus, fake = Cache.open(folder / "cache").corpus("docs"), teacher(folder)
    found = []
    for start, stop in zip(corpus.document_rows, corpus.document_rows[1:], strict=False):
        rows = [_row(model, corpus.row(i), fake, corpus.tokenizer) for i in range(int(start), int(stop))]
        found.append({name: np.concatenate([row[name] for row in rows]) for name in rows[0]})
    return found


def _row(model: Any, row: NDArray[np.uint32], fake: FakeTeacher, tokenizer: Any) -> dict[str, NDArray[np.float64]]:
    ids = torch.tensor([[*PREFIX, *row.tolist()]])
    with torch.no_grad():
        log_p = log_softmax(model(input_ids=ids).logits[0, len(PREFIX) :].numpy(), axis=1)
    log_t, kept = fake.dense_logprobs(row), fake.distribution(row, K)
    p, t = np.exp(log_p), np.exp(log_t)
    at, best = np.arange(len(row))[:, None], log_p.argmax(axis=1)
    on_k, tail = p[at, kept.ids], np.exp(kept.log_tail.astype(np.float64))
    likeliest = np.argsort(-p, axis=1)[:, :K]
    labels = row[1:].astype(np.int64)
    # A byte-level token has a printable character for each byte, the space's being G with a dot.
    spelt = [tokenizer.id_to_token(label) for label in labels.tolist()]
    nothing = [np.nan]
    return {
        "loss": np.r_[-log_p[np.arange(len(labels)), labels], nothing],
        "right": np.r_[best[:-1] == labels, nothing],
        "confidence": np.r_[p.max(axis=1)[:-1], nothing],
        "bytes": np.r_[[len(token) for token in spelt], nothing],
        "digits": np.r_[[token.strip("\u0120").isdigit() for token in spelt], nothing],
        "kl": rel_entr(np.exp(kept.logprobs.astype(np.float64)), on_k).sum(axis=1)
        + rel_entr(tail, 1 - on_k.sum(axis=1)),
        "top1": (best == kept.ids[:, 0]).astype(float),
        "overlap": np.array(
            [len(set(a) & set(b)) / K for a, b in zip(likeliest.tolist(), kept.ids.tolist(), strict=True)]
        ),
        "mass": on_k.sum(axis=1),
        "full_kl": rel_entr(t, p).sum(axis=1),
        "reverse_kl": rel_entr(p, t).sum(axis=1),
        "total_variation": 0.5 * np.abs(p - t).sum(axis=1),
        "acceptance": np.minimum(p, t).sum(axis=1),
    }


def check(found: Any, sums: list[float], counts: list[float], rel: float = 2e-5) -> None:
    """Compare with the mean and its textbook error over documents (Cochran, 6.4); float32 forwards give `rel`."""
    x, n = np.array(sums), np.array(counts)
    mean = x.sum() / n.sum()
    error = math.sqrt(len(x) * np.var(x - mean * n, ddof=1)) / n.sum()
    assert found["value"] == pytest.approx(mean, rel=rel)
    assert found["stderr"] == pytest.approx(error, rel=100 * rel)


def test_every_measure_is_what_plain_float64_finds(folder: Path, evaluated: Evaluated) -> None:
    docs = in_float64(folder)
    (found,) = evaluated(folder / "model", "--cache", folder / "cache", "--corpus", "docs")["corpora"].values()
    assert (found["documents"], found["notes"]) == (9, [])
    labels = [float((~np.isnan(doc["loss"])).sum()) for doc in docs]
    loss = [float(np.nansum(doc["loss"])) for doc in docs]
    assert found["tokens"] == sum(labels)
    check(found["loss"], loss, labels)
    check(found["top1"], [float(np.nansum(doc["right"])) for doc in docs], labels)
    check(found["bits_per_byte"], [each / math.log(2) for each in loss], [float(np.nansum(d["bytes"])) for d in docs])
    assert found["perplexity"]["value"] == pytest.approx(math.exp(sum(loss) / sum(labels)), rel=1e-4)
    assert found["perplexity"]["stderr"] == pytest.approx(found["perplexity"]["value"] * found["loss"]["stderr"])
    against = found["teachers"]["big"]
    for name in ("kl", "top1", "overlap", "mass", "full_kl", "reverse_kl", "total_variation", "acceptance"):
        # Whole distributions are kept in float32 here, a top-k as well.
        check(against[name], [float(doc[name].sum()) for doc in docs], [len(doc[name]) for doc in docs])


def test_calibration_is_what_plain_bins_give(folder: Path, evaluated: Evaluated) -> None:
    docs = in_float64(folder)
    (found,) = evaluated(folder / "model", "--cache", folder / "cache", "--corpus", "docs")["corpora"].values()

    def error(documents: list[dict[str, NDArray[np.float64]]]) -> float:
        sure = np.concatenate([doc["confidence"] for doc in documents])
        right = np.concatenate([doc["right"] for doc in documents])
        sure, right = sure[~np.isnan(sure)], right[~np.isnan(right)]
        bins = np.digitize(sure, np.linspace(0, 1, 16)[1:-1])
        far = [abs(right[bins == b].mean() - sure[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
        return float(np.sum(far))

    assert found["ece"]["value"] == pytest.approx(error(docs), rel=1e-5)
    without = [error(docs[:i] + docs[i + 1 :]) for i in range(len(docs))]
    assert found["ece"]["stderr"] == pytest.approx(math.sqrt(8 / 9 * 9 * np.var(without)), rel=1e-3)
    assert sum(each["tokens"] for each in found["reliability"]) == found["tokens"]


def test_parts_by_kind_and_by_file(folder: Path, evaluated: Evaluated) -> None:
    docs = in_float64(folder)
    (found,) = evaluated(folder / "model", "--cache", folder / "cache", "--corpus", "docs")["corpora"].values()
    digits = found["by_category"]["digits"]
    counts = [float(np.nansum(doc["digits"])) for doc in docs]
    assert digits["tokens"] == sum(counts)
    sums = [float(np.nansum(np.where(doc["digits"] == 1, doc["loss"], 0))) for doc in docs]
    assert digits["loss"]["value"] == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    assert sum(part["tokens"] for part in found["by_category"].values()) == found["tokens"]
    assert set(found["by_source"]) == {"a.jsonl", "b.jsonl"}
    first = found["by_source"]["a.jsonl"]
    check(
        first["loss"],
        [float(np.nansum(doc["loss"])) for doc in docs[:5]],
        [float((~np.isnan(doc["loss"])).sum()) for doc in docs[:5]],
    )
    check(first["kl"]["big"], [float(doc["kl"].sum()) for doc in docs[:5]], [len(doc["kl"]) for doc in docs[:5]])


def test_a_page_shows_it_all_and_needs_nothing_else(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    page = tmp_path / "page.html"
    arguments = [str(folder / "model"), "--cache", str(folder / "cache"), "--corpus", "docs", "--html", str(page)]
    assert main(["evaluate", *arguments]) == 0
    shown = capsys.readouterr()
    assert "docs: against teachers" in shown.out
    assert max(map(len, shown.out.removesuffix(f"page: {page}\n").splitlines())) <= 80
    assert "evaluate: " in shown.err, "progress goes beside the answer"
    text = page.read_text(encoding="utf-8")
    assert text.count("<figure>") == 3
    for words in ("loss by source", "by confidence", "acceptance rate", "What does it write?", "What comes next?"):
        assert words in text
    for outside in ("<script", "<link", "<img", "url(", "src="):
        assert outside not in text


def test_a_teacher_without_whole_distributions_is_a_note(folder: Path, tmp_path: Path, evaluated: Evaluated) -> None:
    shutil.copytree(folder / "cache", tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache" / "targets" / "big" / "docs" / "sets")
    whole = evaluated(folder / "model", "--cache", tmp_path / "cache", "--corpus", "docs")
    found = whole["corpora"]["docs"]
    assert found["teachers"]["big"]["acceptance"] is None
    assert found["teachers"]["big"]["kl"]["value"] > 0
    (note,) = found["notes"]
    assert note.endswith("run `potstill prefill --cache ROOT --corpus docs --teacher big=MODEL --top-k 0 --dense`")


def test_a_teacher_that_lacks_shards_is_not_compared_with(folder: Path, tmp_path: Path, evaluated: Evaluated) -> None:
    shutil.copytree(folder / "cache", tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache" / "targets")
    fill(tmp_path / "cache", "big", fields=Fields(k=K), teacher=teacher(folder), shards=1)
    found = evaluated(folder / "model", "--cache", tmp_path / "cache", "--corpus", "docs")["corpora"]["docs"]
    assert found["teachers"] == {}
    assert found["loss"]["value"] > 0
    assert "teacher 'big' lacks" in found["notes"][0]
    assert "run `potstill prefill` for it" in found["notes"][0]


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["evaluate", *map(str, arguments)]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = [each for each in shown.err.splitlines() if not each.startswith("evaluate: ")]
    return line


def test_what_is_neither_run_nor_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, folder)
    assert line.startswith("not_found: ")
    assert line.endswith("is neither the folder of a run nor of a model: there is no config.json")


def test_a_model_without_rows_to_judge_it_by(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, folder / "model").endswith("so what to evaluate it on is not known; add --cache ROOT")
    assert refused(capsys, folder / "model", "--cache", folder / "cache").endswith("add --corpus NAME")


def test_a_model_of_another_vocabulary(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).save_pretrained(tmp_path / "small")
    capsys.readouterr()
    line = refused(capsys, tmp_path / "small", "--cache", folder / "cache", "--corpus", "docs")
    assert "vocab_size is 300; the corpus's tokenizer has 512 ids" in line
    other = write_cache(tmp_path, documents=4, teachers=())
    line = refused(capsys, folder / "model", "--cache", other, "--corpus", "docs")
    assert line.startswith("spec_mismatch: corpus 'docs' has another tokenizer than model ")
    assert "ingest the text again with the tokenizer of model " in line


def test_a_model_that_diverged(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    model.model.norm.weight.data[0] = math.nan
    model.save_pretrained(tmp_path / "diverged")
    capsys.readouterr()
    line = refused(capsys, tmp_path / "diverged", "--cache", folder / "cache", "--corpus", "docs")
    assert line.endswith("the model gives NaN in row 0 of corpus 'docs'; its weights are damaged, or diverged")
