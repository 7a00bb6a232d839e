"""LokiLM's model: against formulas in float64, its ways to attend, its cache, and without this package."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from potstill.student_trainer.models.build import build_student, load_student, save_student
from potstill.student_trainer.models.lokilm import LokiLMConfig, LokiLMForCausalLM
from potstill.student_trainer.models.lokilm.modeling_lokilm import Alibi, alibi_attention, alibi_slopes
from potstill.student_trainer.models.settings import StudentConfig
from potstill.student_trainer.train.loop import train
from tests.support.tiny_runs import config_of, write_cache

pytestmark = pytest.mark.usefixtures("one_torch_thread")
VOCAB = 97
SIZES = {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}


def model_of(num_heads: int = 4, implementation: str | None = None) -> LokiLMForCausalLM:
    """A model whose next-token distributions are far from flat."""
    config = LokiLMConfig(**SIZES, num_attention_heads=num_heads, initializer_range=0.3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: LokiLMForCausalLM = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
        model.eval()
    return model


def rows(batch: int, tokens: int) -> Tensor:
    return torch.randint(VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(1))


def slope(head: int, num_heads: int) -> float:
    """As the paper's own code has it (arXiv 2108.12409): those between for heads that are no power of two."""
    if math.log2(num_heads).is_integer():
        start = 2 ** -(2 ** -(math.log2(num_heads) - 3))
        return float(start ** (head + 1))
    closest = 2 ** math.floor(math.log2(num_heads))
    return slope(head, closest) if head < closest else slope(2 * (head - closest), 2 * closest)


def plain_logits(weights: dict[str, Tensor], tokens: Tensor, num_heads: int, eps: float = 1e-6) -> Tensor:
    """Logits [T, V] of one row [T] in float64, one head and one query after the other."""
    w = {name: weight.double() for name, weight in weights.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"]

    x = w["model.embed_tokens.weight"][tokens]
    for layer in range(SIZES["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        h = norm(x, f"{at}.input_layernorm")
        q, k, v = (h @ w[f"{at}.self_attn.{name}_proj.weight"].T for name in "qkv")
        dim = q.shape[1] // num_heads
        heads = []
        for head in range(num_heads):
            part = slice(head * dim, (head + 1) * dim)
            seen = []
            for i in range(len(tokens)):
                distance = torch.arange(i + 1).double() - i
                scores = k[: i + 1, part] @ q[i, part] / math.sqrt(dim) + slope(head, num_heads) * distance
                seen.append(torch.softmax(scores, 0) @ v[: i + 1, part])
            heads.append(torch.stack(seen))
        x = x + torch.cat(heads, dim=1) @ w[f"{at}.self_attn.o_proj.weight"].T
        h = norm(x, f"{at}.post_attention_layernorm")
        gate, up = (h @ w[f"{at}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate / (1 + torch.exp(-gate)) * up) @ w[f"{at}.mlp.down_proj.weight"].T
    return norm(x, "model.norm") @ w["lm_head.weight"].T


def test_the_preset_is_lokilm_by_its_parameters() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("lokilm"))
        tiny, _ = build_student(StudentConfig(preset="lokilm-tiny"), seed=0, vocab_size=VOCAB, row_tokens=9)
        large, _ = build_student(StudentConfig(preset="lokilm-1.4b"), seed=0, vocab_size=49_152, row_tokens=2048)
    count = 2 * 49_152 * 2048 + 24 * (4 * 2048**2 + 3 * 2048 * 5632 + 2 * 2048) + 2048
    assert large.num_parameters() == model.num_parameters() == count == 1_434_552_320
    assert (tiny.config.vocab_size, tiny.config._attn_implementation) == (VOCAB, "alibi")


@pytest.mark.parametrize("implementation", [None, "sdpa", "eager"])
@pytest.mark.parametrize("num_heads", [1, 4, 6])
def test_logits_are_those_of_the_formulas(num_heads: int, implementation: str | None) -> None:
    model, tokens = model_of(num_heads, implementation), rows(2, 70)
    expected = torch.stack([plain_logits(model.state_dict(), row, num_heads) for row in tokens])
    with torch.no_grad():
        found = model(tokens).logits
        exact = model.double()(tokens).logits
    assert expected.std() > 0.5
    assert (found - expected).abs().max() < 1e-4
    assert (exact - expected).abs().max() < 1e-6  # slopes are float32
    assert [slope(head, num_heads) for head in range(num_heads)] == pytest.approx(alibi_slopes(num_heads).tolist())


@pytest.mark.parametrize("bad", ["flash_attention_2", "flex_attention"])
def test_attention_without_slopes_is_refused(bad: str) -> None:
    with pytest.raises((ValueError, ImportError), match="does not support"):
        model_of(implementation=bad)


@pytest.mark.parametrize("implementation", ["alibi", "sdpa"])
def test_a_cache_changes_nothing_that_is_written(implementation: str) -> None:
    model, prompts = model_of(implementation=implementation), rows(3, 9)
    mask = torch.ones_like(prompts)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    written = [model.generate(prompts, **options, **more) for more in ({}, {"use_cache": False})]
    written.append(model.generate(prompts, **options, cache_implementation="static"))
    assert torch.equal(written[0], written[1])
    assert torch.equal(written[0], written[2])
    alone = model.generate(prompts[:1, 4:], max_new_tokens=24, do_sample=False, pad_token_id=0)
    assert torch.equal(written[0][0, 4:], alone[0]), "padding on the left is not seen"


def test_a_row_read_in_parts_is_the_row() -> None:
    model, tokens = model_of(), rows(2, 40)
    with torch.no_grad():
        whole = model(tokens).logits
        first = model(tokens[:, :17], use_cache=True)
        rest = model(tokens[:, 17:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], dim=1), whole, rtol=0, atol=1e-4)


def test_recomputed_activations_give_the_same_gradients() -> None:
    gradients = []
    for again in (False, True):
        model = model_of().train()
        if again:
            model.gradient_checkpointing_enable()
        model(rows(2, 20), labels=rows(2, 20), use_cache=False).loss.backward()
        gradients.append([weight.grad for weight in model.parameters()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_far_into_a_row_no_precision_is_lost(dtype: torch.dtype, most: float) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, 64, 32, generator=generator).to(dtype) for _ in range(3))
    at = torch.arange(4000, 4064)
    found, _ = alibi_attention(
        torch.nn.Identity(), q, k, v, None, scaling=32**-0.5, alibi=Alibi.at(at[None], 4, 32, dtype)
    )
    bias = alibi_slopes(4).double()[:, None, None] * (at - at[:, None]).double()
    scores = q.double() @ k.double().transpose(2, 3) / 32**0.5 + bias
    scores = scores.masked_fill(at > at[:, None], -torch.inf)
    assert (found.double() - (scores.softmax(-1) @ v.double()).transpose(1, 2)).abs().max() < most


def test_bfloat16_in_training_is_near_float32() -> None:
    model, tokens = model_of(), rows(2, 60)
    with torch.no_grad():
        exact = model(tokens).logits.log_softmax(-1)
        for implementation in ("alibi", "sdpa"):
            model.set_attn_implementation(implementation)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = model(tokens).logits.float().log_softmax(-1)
            assert (found - exact).abs().mean() < 0.05


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that a run of the small preset publishes, packed and unpacked rows in it."""
    folder = tmp_path_factory.mktemp("run")
    root = write_cache(folder / "cache")
    train(config_of(root, folder / "run", student={"config": None, "preset": "lokilm-tiny"}, train={"steps": 2}))
    return folder / "run" / "model"


@pytest.mark.slow  # a process that imports torch and transformers
def test_a_published_student_loads_without_this_package(published: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['potstill'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(published)!r}, trust_remote_code=True)\n"
        f"torch.save(model(torch.arange(20)[None]).logits, {str(tmp_path / 'logits.pt')!r})\n"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        ours = load_student(published)(torch.arange(20)[None]).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), ours, rtol=0, atol=1e-5)


def test_a_published_student_is_a_checkpoint_to_begin_from(published: Path, tmp_path: Path) -> None:
    student = StudentConfig(checkpoint=str(published), layers=(0, 3))
    model, stored = build_student(student, seed=0, vocab_size=48, row_tokens=9)
    save_student(model, tmp_path)
    assert (model.config.num_hidden_layers, stored) == (2, "float32")
    assert "import potstill" not in (code := (tmp_path / "modeling_lokilm.py").read_text())
    assert "from potstill" not in code
