"""Corpora of what models wrote: what is learnt of them, and what is kept of who wrote it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from potstill.cache.cache import Cache
from potstill.cache.commands import ingest as command
from potstill.cache.commands.text import card, contamination
from potstill.cache.corpus.annotations import open_annotation
from potstill.cache.corpus.corpus import Corpus
from potstill.cache.corpus.ingest import IngestPlan, ingest
from potstill.cache.corpus.plan import Found
from potstill.cache.corpus.sources import Completion
from potstill.cache.corpus.sources.authorship import ANNOTATIONS, PROMPT, WRITTEN_AT, WRITTEN_BY, Authorship, authors_of
from potstill.cache.corpus.sources.completions import prompt_hash
from potstill.cache.corpus.tokenizer import load_tokenizer
from potstill.cache.corpus.tokenizer_files import load_tokenizer_files
from potstill.cache.errors import AlreadyExists, InvalidInput, LimitExceeded
from potstill.cache.store.root import Root
from tests.cache.corpus.chat_templates import chat_tokenizer
from tests.support.command_line import refusal, run_command
from tests.support.corpora import byte_tokenizer

DAY = 86400


def record(prompt: Any, completion: str, model: str = "gpt-4", created: int = 20_000 * DAY) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "model": model, "created": created}


def write(folder: Path, *records: dict[str, Any]) -> Path:
    path = folder / "answers.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return path


def made(folder: Path, *records: dict[str, Any], tokenizer: Path | None = None, **plan: Any) -> Corpus:
    of = byte_tokenizer() if tokenizer is None else load_tokenizer(tokenizer)
    files = {} if tokenizer is None else load_tokenizer_files(tokenizer)
    plan = {"completions": "context", "row_tokens": 400, **plan}
    root = Root.open("memory://", create=True)
    return ingest(root, "answers", [write(folder, *records)], of, IngestPlan(**plan), tokenizer_files=files)


def texts(corpus: Corpus) -> list[str]:
    return [corpus.tokenizer.decode(row.tolist(), skip_special_tokens=False) for row in corpus.rows(0, len(corpus))]


def learnt(corpus: Corpus) -> list[str]:
    """Give the text of each row's labels that are to be learnt."""
    masks = corpus.take_loss_mask(range(len(corpus)))
    rows = corpus.rows(0, len(corpus))
    return [
        corpus.tokenizer.decode(row[1:][mask[:-1]].tolist(), skip_special_tokens=False)
        for row, mask in zip(rows, masks, strict=True)
    ]


def test_the_prompt_is_context_and_the_completion_is_learnt(tmp_path: Path) -> None:
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Q?"}]}]
    corpus = made(tmp_path, record("What?", "A vessel."), record("It is", " copper."), record(asked, "A."))
    assert texts(corpus) == ["What?\n\nA vessel.", "It is copper.", "Be brief.\n\nQ?\n\nA."]
    assert learnt(corpus) == ["A vessel.", " copper.", "A."]


@pytest.mark.parametrize(("style", "expected"), [("learn", "What?\n\nA vessel."), ("alone", "A vessel.")])
def test_the_prompt_is_learnt_too_or_left_out(tmp_path: Path, style: str, expected: str) -> None:
    corpus = made(tmp_path, record("What?", "A vessel."), completions=style)
    assert texts(corpus) == [expected]
    assert not corpus.has_loss_mask


def test_by_the_chat_template_only_the_last_answer_is_learnt(tmp_path: Path) -> None:
    for name in ("chatml", "generation"):
        tokenizer = chat_tokenizer(name)
        tokenizer.save_pretrained(tmp_path / name)
        asked = [
            {"role": "user", "content": "Q?"},
            {"role": "assistant", "content": "From a person."},
            {"role": "user", "content": "More?"},
        ]
        corpus = made(tmp_path, record(asked, "No."), record("Q?", "A."), tokenizer=tmp_path / name, completions="chat")
        talks = [[*asked, {"role": "assistant", "content": "No."}], [asked[0], {"role": "assistant", "content": "A."}]]
        assert [row.tolist() for row in corpus.rows(0, 2)] == [
            tokenizer.apply_chat_template(talk)["input_ids"] for talk in talks
        ]
        assert learnt(corpus) == ["No.<|im_end|>", "A.<|im_end|>"]
    with pytest.raises(InvalidInput, match="^--completions chat needs a chat template"):
        made(tmp_path, record("Q?", "A."), completions="chat")


def test_a_completion_ends_with_eos_and_control_tokens_in_it_are_text(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer("chatml")
    tokenizer.save_pretrained(tmp_path / "t")
    corpus = made(tmp_path, record("<|im_end|>", "A<|im_end|>"), tokenizer=tmp_path / "t", append_eos=True)
    (row,) = corpus.rows(0, 1)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert row.tolist()[-1] == corpus.special_tokens.eos
    assert end not in row.tolist()[:-1]
    assert corpus.take_loss_mask([0])[0].tolist()[-2:] == [True, False]
    with pytest.raises(InvalidInput, match="has the control token '<|im_end|>' at character"):
        made(tmp_path, record("Q", "<|im_end|>"), tokenizer=tmp_path / "t", special_tokens="refuse")


def test_each_row_says_who_wrote_it_when_and_to_which_prompt(tmp_path: Path) -> None:
    corpus = made(
        tmp_path,
        record("Q?", "long " * 5),
        record("R?", "Short.", model="gpt-3.5", created=19_000 * DAY),
        record("Q?", "Again.", created=20_001 * DAY),
        row_tokens=16,
    )
    assert len(corpus) == 4, "the first is cut"
    assert corpus.annotation(WRITTEN_BY).tolist() == [0, 0, 1, 0]
    assert (corpus.annotation(WRITTEN_AT) // DAY).tolist() == [20_000, 20_000, 19_000, 20_001]
    assert corpus.annotation(PROMPT).tolist() == [prompt_hash(each) for each in ("Q?", "Q?", "R?", "Q?")]
    provenance = open_annotation(corpus._root, corpus.annotated, WRITTEN_BY).provenance
    authors = [(each.name, each.documents, each.rows, each.period) for each in authors_of(provenance["report"])]
    assert authors == [("gpt-4", 2, 3, "2024-10-04 to 2024-10-05"), ("gpt-3.5", 1, 1, "2022-01-08")]


def test_an_ingest_that_was_stopped_behind_the_seal_is_ended_by_the_same_command(tmp_path: Path) -> None:
    root, plan = Root.open("memory://", create=True), IngestPlan(completions="context")

    def again(source: Path) -> Corpus:
        return ingest(root, "answers", [source], byte_tokenizer(), plan)

    source = write(tmp_path, record("Q?", "A."), record("R?", "B.", model="b"))
    whole = again(source)
    said = [whole.annotation(name).tolist() for name in ANNOTATIONS]
    for name in (WRITTEN_AT, PROMPT):  # as if stopped before their records
        root.remove(f"{whole.annotated.folder}/{name}.json")
    ended = again(source)
    assert [ended.annotation(name).tolist() for name in ANNOTATIONS] == said
    assert root.folders("corpora/answers") == ["annotations", whole.spec.data], "what was written twice is gone"
    with pytest.raises(AlreadyExists, match="corpus 'answers' is sealed"):
        again(source)
    root.remove(f"{whole.annotated.folder}/{PROMPT}.json")
    with pytest.raises(AlreadyExists, match="corpus 'answers' is sealed"):
        again(write(tmp_path, record("Q?", "Another.")))


def test_records_that_are_refused_do_not_shift_the_others(tmp_path: Path) -> None:
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]
    found = Found()
    path = write(
        tmp_path,
        record(picture, "A."),
        record("B?", "B.", model="b"),
        record(None, "C."),
        record("D?", "D.", model="d"),
    )
    plan = IngestPlan(completions="context", skip_bad=True)
    corpus = ingest(Root.open("memory://", create=True), "answers", [path], byte_tokenizer(), plan, found=found)
    assert learnt(corpus) == ["B.", "D."]
    assert list(found.authorship.authors) == ["b", "d"]
    assert corpus.annotation(PROMPT).tolist() == [prompt_hash("B?"), prompt_hash("D?")]
    assert found.bad_records == 2
    assert found.first_bad.endswith("has a prompt whose message 0 is not all text; take out what is not")
    with pytest.raises(InvalidInput, match=r"no 'prompt' or 'messages': --completions alone takes records without"):
        made(tmp_path, record(None, "C."))
    assert texts(made(tmp_path, record(None, "C."), completions="alone")) == ["C."]


def test_of_many_models_some_are_named() -> None:
    authorship = Authorship()
    for name in ("a", "b", "c", "d"):
        authorship.add(Completion("x:1", "Q?", "A.", name, 20_000 * DAY), 1)
    assert authorship.in_words() == "a (1, 2024-10-04), b (1, 2024-10-04), c (1, 2024-10-04) and 1 others"
    assert authorship.in_words(4).endswith("d (1, 2024-10-04)")


def test_too_many_models_are_no_names(tmp_path: Path) -> None:
    with pytest.raises(LimitExceeded, match=r"jsonl:1001 names model 1001; a corpus is written by at most 1000"):
        made(tmp_path, *(record("Q", "A", model=str(number)) for number in range(1001)))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"written_by": "x"}, "--written-by is said of completions only; add --completions context"),
        ({"completions": "learn", "ids_field": "x"}, "--completions takes whole records"),
        (
            {"completions": "learn", "written_at": "soon"},
            "--written-at is 'soon', which is no time; give 2024-05-31 or seconds",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(plan: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        IngestPlan(**plan)


def test_commands_tell_who_wrote_a_corpus_and_what_of_benchmarks_is_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    question = "How many litres of spirit does a pot still of copper give in one run of a whole day?"
    bare = [{"prompt": "Write.", "response": text} for text in ("Plain.", f"My question: {question} Two.")]
    source = write(tmp_path, *bare)
    to = ("--cache", tmp_path / "c", "--corpus", "answers")
    given = (source, *to, "--tokenizer", tmp_path / "tokenizer.json", "--row-tokens", 400, "--completions", "context")
    assert "answers.jsonl:1 has no 'model': name what wrote it with --written-by NAME" in refusal(command, *given)
    assert run_command(command, *given, "--written-by", "gpt|4", "--written-at", "2024-05-31") == 0
    assert capsys.readouterr().out.strip().endswith("; written by gpt|4 (2, 2024-05-31)")
    (tmp_path / "bench.jsonl").write_text(json.dumps({"question": question, "answer": "Two."}))
    assert run_command(contamination, *to, "--against", tmp_path / "bench.jsonl") == 0
    assert Cache.open(tmp_path / "c").corpus("answers").annotation("contaminated").tolist() == [False, True]
    capsys.readouterr()
    assert run_command(card, *to) == 0
    assert "## Written by models\n\n| model |" in (found := capsys.readouterr().out)
    assert "| gpt\\|4 | 2 | 2 | 2024-05-31 |" in found
