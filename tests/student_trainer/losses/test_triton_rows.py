"""Triton's kernels by its interpreter against plain torch and float64, and by its compiler for a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from potstill.student_trainer.losses.rows import PLAIN, Rows, _try_out, rows_for
from tests.student_trainer.losses.interpreted import losses_and_gradients
from tests.support.paths import ROOT

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Largest error of an entry, relative to the largest entry."""

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
def test_interpreted_kernels_give_what_plain_torch_and_float64_give(tmp_path: Path) -> None:
    saved = tmp_path / "found.pt"
    # Triton reads it as it is imported.
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.student_trainer.losses.interpreted", str(saved)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    plain, exact = losses_and_gradients(), losses_and_gradients(exact=True)
    by_kernels = torch.load(saved)
    assert by_kernels.keys() == plain.keys()
    for name, (loss, grad) in by_kernels.items():
        for expected_loss, expected in (plain[name], exact[name]):
            assert torch.equal(grad.isnan(), expected.isnan()), name
            far, largest = (
                (grad.double() - expected.double()).nan_to_num().abs().max(),
                expected.nan_to_num().abs().max(),
            )
            assert far <= BOUNDS[grad.dtype] * largest, name
            bound = 1e-12 if grad.dtype == torch.float64 else 1e-5
            assert loss.item() == pytest.approx(expected_loss.item(), rel=bound, nan_ok=True), name
    assert by_kernels["no number"][0].isnan()


@needs_triton
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")  # of its next version
def test_kernels_compile_for_a_gpu_and_plain_torch_stands_in_where_they_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from triton import compiler
    from triton.backends.compiler import GPUTarget

    from potstill.student_trainer.losses import triton_rows

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel in (triton_rows.sums_kernel, triton_rows.write_kernel):
        pointers = dict.fromkeys(kernel.arg_names[:3], "*fp32")
        signature = {**pointers, "stride": "i32", "columns": "i32", "block": "constexpr"}
        source = compiler.ASTSource(fn=kernel, signature=signature, constexprs={"block": triton_rows.BLOCK})
        assert "ld.global" in compiler.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    # Too late for kernels that are imported: here they can run nowhere.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert rows_for.__wrapped__(torch.device("cpu")) == PLAIN
    (told,) = caplog.messages
    assert told.startswith("the loss runs without Triton's kernels, which fail on cpu: 0 active drivers")


def test_a_cpu_has_plain_torch_and_kernels_that_are_wrong_are_found_out() -> None:
    cpu = torch.device("cpu")
    assert rows_for(cpu) == PLAIN
    _try_out(PLAIN, cpu)
    wrong = Rows(PLAIN.sums, lambda z, top, factor: PLAIN.write(z, top, factor * 1.01))
    with pytest.raises(RuntimeError, match="not those of plain torch"):
        _try_out(wrong, cpu)
