"""Students of every kind of config: what they take from the corpus, what is refused, what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from potstill.cache.errors import InvalidInput, LimitExceeded
from potstill.student_trainer.evaluate.result import HELD_OUT, TrainResult
from potstill.student_trainer.metrics.records import read_metrics
from potstill.student_trainer.models.build import build_student, load_student
from potstill.student_trainer.models.settings import StudentConfig
from potstill.student_trainer.train.loop import train
from potstill.student_trainer.train.run import evaluate_run
from tests.support.tiny_runs import STUDENT, VOCAB, config_of, write_cache

pytestmark = pytest.mark.usefixtures("one_torch_thread")
TEXT = {key: value for key, value in STUDENT.items() if key != "model_type"}
TEXT |= {"head_dim": 16, "num_key_value_heads": 1}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 28,
    "patch_size": 14,
}
GEMMA3 = {"model_type": "gemma3", "text_config": TEXT, "vision_config": VISION}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache"))


def built(config: Any, **ids: int) -> PreTrainedModel:
    student = StudentConfig(config=config)
    return build_student(student, seed=0, vocab_size=VOCAB, row_tokens=12, special_ids=ids)[0]


def run_of(root: Path, out: Path, *, steps: int = 1, student: dict[str, Any], **train_changes: Any) -> TrainResult:
    return train(config_of(root, out, student=student, train={"steps": steps, **train_changes}))


def ids_of(config: Any) -> tuple[Any, ...]:
    return config.bos_token_id, config.eos_token_id, config.pad_token_id


def test_ids_that_nobody_typed_are_the_tokenizers() -> None:
    for keys in (GPT2, STUDENT, {**STUDENT, "model_type": "gemma3_text", "head_dim": 16}, GEMMA3):
        none = built(keys)
        assert ids_of(none.config.get_text_config()) == (None, None, None)
        assert none.generation_config is not None
        assert none.generation_config.eos_token_id is None
        some = built(keys, bos_token_id=3, eos_token_id=4)
        assert ids_of(some.config.get_text_config()) == (3, 4, None)
        assert ids_of(some.generation_config) == (3, 4, 4), "padded with what ends a text"
    typed = built({**GPT2, "eos_token_id": 7}, eos_token_id=4, pad_token_id=5)
    assert ids_of(typed.config) == (None, 7, 5)


@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id", "pad_token_id"])
def test_ids_of_another_tokenizer_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=f"student {name} is {VOCAB}, but the corpus's tokenizer has {VOCAB} ids"):
        built({**STUDENT, name: VOCAB})
    with pytest.raises(InvalidInput, match=name):
        built({**GEMMA3, "text_config": {**TEXT, name: VOCAB}})
    keys = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    AutoConfig.for_model(**{**STUDENT, "vocab_size": 100, **keys, name: 99}).save_pretrained(tmp_path)
    with pytest.raises(InvalidInput, match=f"student {name} is 99"):
        built(str(tmp_path))


def test_a_padding_id_in_rows_has_an_embedding_that_is_trained(tmp_path: Path) -> None:
    """As where the padding id also ends a text; torch leaves a padding's embedding as it is."""
    model = built({**STUDENT, "pad_token_id": 5})
    model.save_pretrained(tmp_path)
    for student in (model, load_student(tmp_path)):
        weight = student.get_input_embeddings().weight
        assert weight[5].any()
        student(torch.tensor([[1, 5, 3]])).logits.sum().backward()
        assert weight.grad[5].any()
        assert student.config.pad_token_id == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "bfloat16"}, r"student\.config\.dtype is 'bfloat16', which has no effect: .* train\.save_dtype"),
        ({"problem_type": "regression"}, r"problem_type is 'regression', which has no effect"),
        ({"num_labels": 3}, r"num_labels is 3, which has no effect"),
        ({"loss_type": "ForMaskedLM"}, r"loss_type is 'ForMaskedLM', which has no effect"),
        ({"label_smoothing": 0.1}, r"has no key 'label_smoothing'"),
        ({"hidden_dropout": 0.1}, r"has no key 'hidden_dropout'"),
        ({"model_type": "mixtral", "router_aux_loss_coef": 10.0}, r"no effect while output_router_logits is false"),
        (
            {"model_type": "gemma3"},
            r"'gemma3' has no key '\w+'; those of its text model go into text_config",
        ),
        ({"model_type": "gemma3_text", "text_config": {}}, r"has no key 'text_config'"),
    ],
)
def test_a_key_without_effect_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as error:
        built({**STUDENT, **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("student", "dropped"),
    [
        (STUDENT, {"attention_dropout": 0.5}),
        (GPT2, {"resid_pdrop": 0.5}),
        (STUDENT, {"tie_word_embeddings": True}),
        (STUDENT, {"initializer_range": 0.5}),
    ],
)
def test_keys_that_change_training(root: Path, tmp_path: Path, student: Any, dropped: dict[str, Any]) -> None:
    still = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0} if student is GPT2 else {}
    for name, keys in (("with", dropped), ("without", {})):
        run_of(root, tmp_path / name, student={"config": {**student, **still, **keys}})
    first = [read_metrics(tmp_path / name)[1]["loss"] for name in ("with", "without")]
    assert first[0] != pytest.approx(first[1], rel=1e-6)


@pytest.mark.parametrize(
    "keys", [GEMMA3, pytest.param({"model_type": "llama4", "text_config": TEXT}, marks=pytest.mark.slow)]
)
def test_nested_configs_train_go_on_and_load(root: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    for steps in (2, 3):
        result = run_of(root, tmp_path / "run", steps=steps, student={"config": keys}, schedule_steps=3)
    run_of(root, tmp_path / "straight", steps=3, student={"config": keys})
    assert evaluate_run(tmp_path / "run") == {HELD_OUT: result.held_out}
    resumed, straight = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("run", "straight"))
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert loaded.config.get_text_config().vocab_size == VOCAB
    onward = {"config": None, "checkpoint": str(tmp_path / "run" / "model")}
    assert run_of(root, tmp_path / "onward", student=onward).finished


def test_only_the_text_model_of_a_wrapper_is_trained(tmp_path: Path) -> None:
    model = built(GEMMA3)
    model.save_pretrained(tmp_path)
    for student in (model, load_student(tmp_path)):
        frozen = {name for name, weight in student.named_parameters() if not weight.requires_grad}
        assert frozen
        assert all("vision" in name or "projector" in name for name in frozen)
    with pytest.raises(LimitExceeded, match="max_position_embeddings is 32"):
        build_student(StudentConfig(config=GEMMA3), seed=0, vocab_size=VOCAB, row_tokens=33)


def test_a_wrapper_that_is_no_language_model_is_refused_in_one_line() -> None:
    with pytest.raises(InvalidInput, match="it is no causal language model: Unrecognized configuration class") as error:
        built({"model_type": "mistral3", "text_config": {"model_type": "mistral", **TEXT}})
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_an_unknown_type_is_told_without_every_type_that_there_is() -> None:
    with pytest.raises(InvalidInput, match="Unrecognized model identifier: lama") as error:
        built({"model_type": "lama"})
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("./no/such", r"there is no such folder here$"),
        ("no/such/folder", r"there is no such folder here, and it is no name of the Hugging Face hub$"),
        ("no/such", r"no such folder here, and the Hugging Face hub at http://127\.0\.0\.1:9 cannot be reached$"),
    ],
)
def test_a_mistyped_checkpoint_is_told_at_once(name: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("potstill.cache.hub.getproxies", dict)
    with pytest.raises(InvalidInput, match=rf"^student\.checkpoint is '{name}': .*{told}"):
        build_student(StudentConfig(checkpoint=name), seed=0, vocab_size=VOCAB, row_tokens=8)


def dtypes(run: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(run / "model" / "model.safetensors").values()}


def test_a_model_is_published_in_the_precision_of_its_checkpoint(root: Path, tmp_path: Path) -> None:
    built(STUDENT).to(torch.bfloat16).save_pretrained(tmp_path / "start")
    student = {"config": None, "checkpoint": str(tmp_path / "start")}
    for steps in (1, 2):  # the second goes on from a checkpoint, which is float32
        run_of(root, tmp_path / "run", steps=steps, student=student, schedule="constant")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002" / "model" / "model.safetensors"
    assert {tensor.dtype for tensor in load_file(checkpoint).values()} == {torch.float32}
    assert dtypes(tmp_path / "run") == {torch.bfloat16}
    sizes = [(tmp_path / part / "model.safetensors").stat().st_size for part in ("start", "run/model")]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)
    assert AutoConfig.from_pretrained(tmp_path / "run" / "model").dtype == torch.bfloat16
    run_of(root, tmp_path / "wide", student=student, save_dtype="float32")
    run_of(root, tmp_path / "random", student={"config": STUDENT})
    run_of(root, tmp_path / "half", student={"config": STUDENT}, save_dtype="float16")
    assert [dtypes(tmp_path / run) for run in ("wide", "random", "half")] == [
        {torch.float32},
        {torch.float32},
        {torch.float16},
    ]
