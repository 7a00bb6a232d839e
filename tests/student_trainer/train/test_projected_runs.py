"""Runs with a teacher of another tokenizer: what its projected targets cannot serve is told at the start."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from potstill.cache import Cache
from potstill.cache.errors import NotCommitted, UnsupportedField
from potstill.clients.cli import main
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.train.loop import train
from potstill.student_trainer.train.run import open_run
from tests.support.corpora import byte_tokenizer, topics
from tests.support.tiny_runs import STUDENT, config_of
from tests.support.tokenizers.small import trained
from tests.support.tokenizers.two_corpora import ingested, projected, taught, write

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher `fake` has `teachers` itself, `students` projected, and of `partly` all but one shard."""
    folder = tmp_path_factory.mktemp("projected")
    cache = Cache.open(folder / "cache", mode="r+")
    source, own = write(folder / "text", topics(6, characters=300)), trained(topics(20), 400)
    teachers = ingested(cache, "teachers", source, byte_tokenizer())
    taught(cache, teachers, k=4, missing=1)
    ingested(cache, "partly", source, own)
    projected(cache, "partly")
    taught(cache, teachers, k=4)
    ingested(cache, "students", source, own)
    projected(cache, "students")
    ingested(cache, "none", write(folder / "more", topics(8, characters=200)[6:]), own)
    return folder / "cache"


def of(root: Path, out: Path, corpus: str = "students", **train_keys: Any) -> TrainConfig:
    return config_of(
        root,
        out,
        data={"corpus": corpus, "held_out": 3},
        student={"config": {**STUDENT, "max_position_embeddings": 64}},
        train={"steps": 1, "batch_rows": 4, "eval_every": 1, "checkpoint_every": 1, **train_keys},
    )


@pytest.mark.parametrize(
    ("settings", "needs"),
    [
        ({"loss": "draws"}, "train.loss 'draws' needs draws"),
        ({"dense": True}, "train.dense needs the logprobs of all ids"),
        ({"temperature": 2.0}, "train.temperature 2 needs log Z at it"),
    ],
)
def test_what_is_no_top_k_is_refused_without_advice_to_prefill(
    root: Path, tmp_path: Path, settings: dict[str, Any], needs: str
) -> None:
    key = needs.partition(" ")[0]
    told = f"{needs}, which targets of 'fake' cannot have: they are projected from another tokenizer's; leave {key} out"
    with pytest.raises(UnsupportedField, match=f"^{re.escape(told)}$"), open_run(of(root, tmp_path, **settings)):
        pass


def test_likelihoods_of_chunks_need_a_projected_teacher(root: Path, tmp_path: Path) -> None:
    """Nothing is measured or written before."""
    with pytest.raises(UnsupportedField, match=r"train.alm is 0.25, but no teacher's targets of corpus 'teachers' are"):
        train(of(root, tmp_path / "run", "teachers", alm=0.25))
    assert not (tmp_path / "run").exists()


def test_shards_that_were_not_projected_yet(root: Path, tmp_path: Path) -> None:
    told = r"corpus 'partly'; run `potstill project` for it, or set data.missing to 'skip'$"
    with pytest.raises(NotCommitted, match=told), open_run(of(root, tmp_path, "partly")):
        pass


def test_an_evaluation_does_not_send_for_what_cannot_be(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(of(root, tmp_path / "run", alm=0.25))
    assert main(["evaluate", str(tmp_path / "run"), "--corpus", "none", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    *_, note = found["notes"]
    assert note.startswith("targets of teacher 'fake' are projected from another tokenizer's, which gives no whole")
    note, *_ = found["corpora"]["none"]["notes"]
    assert note.endswith("run `potstill project --cache ROOT --corpus none --teacher fake --from TEACHERS`")
