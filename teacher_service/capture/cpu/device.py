"""A CPU as a `CaptureDevice`: a compiled sweep of each row of logits, in threads that have a core each.

Each thread works on blocks of its own: torch's own threads meet after every operation, which takes ten milliseconds
instead of 20 us when another process has one of the cores. For the same reason they must not spin when the head is
done: `vllm_engine` sets GOMP_SPINCOUNT, without which the targets take twice the time.

Shape legend:  S rows of a block, V vocabulary size, K kept entries, N draws.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray

from potstill.cache.types import Fields
from potstill.teacher_service.capture.cpu.kernel import Arrays, fill
from potstill.teacher_service.capture.device import FAILURES, CaptureDevice, one_line
from potstill.teacher_service.capture.layout import Drawn, float_sections, num_floats, split

BLOCK_BYTES = 8 * 2**20
"""Bytes of float32 logits that a thread works on at once."""


def cpu_device() -> CaptureDevice:
    """Set up capture on the cores of this process.

    Memory beside the logits and the answer: 2 V float32 and the block's draws, 4 N float32 a row, for each thread.

    Raises:
        RuntimeError: numba cannot compile the code.
    """
    _compile()
    _keep_freed_memory()
    num_threads = torch.get_num_threads()
    return CaptureDevice(
        # Below the 32 MiB from which glibc maps fresh pages for each allocation, which cost a quarter of the head's
        # time, and small enough for the third cache.
        head_bytes=16 * 2**20,
        block_bytes=BLOCK_BYTES,
        num_threads=num_threads,
        capture_block=capture_on_cpu,
        map=_a_core_each(num_threads).map,
    )


def _compile() -> None:
    """Compile the kernel, or load it from disk, so that the first rows do not wait for it."""
    want = Fields(k=1, draws=1, entropy=True, temperatures=(2.0,), dense=True)
    sections = float_sections(want, 1, 2)
    out = split(torch.empty(num_floats(sections)), sections)
    out["ids"] = torch.empty((1, 1), dtype=torch.int32)
    try:
        capture_on_cpu(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), want, np.zeros((1, 1)), out)
    except (*FAILURES, ImportError, OSError, EOFError, pickle.UnpicklingError) as error:
        cause = one_line(error)
        raise RuntimeError(
            f"numba cannot compile or keep the capture's code ({cause}); NUMBA_CACHE_DIR names its folder"
        ) from error


@torch.inference_mode()
def capture_on_cpu(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    want: Fields,
    uniforms: NDArray[np.float64] | None,
    out: Mapping[str, torch.Tensor],
) -> Drawn | None:
    """Compute one block as `capture_with_torch` does, in this thread alone."""
    num_rows, vocab_size = logits.shape
    nothing, of_no_columns = np.empty(0, np.float32), np.empty((num_rows, 0), np.float32)
    held = {name: view.numpy() for name, view in out.items()}
    arrays = Arrays(
        top=held["top"],
        ids=held["ids"] if want.k else np.empty((num_rows, 0), np.int32),
        logprobs=held.get("logprobs", of_no_columns),
        labels=np.empty(0, np.int64) if labels is None else labels.numpy(),
        label_logprob=held.get("label_logprob", nothing),
        entropy=held.get("entropy", nothing),
        temperatures=np.array(want.temperatures, np.float64),
        log_z=held.get("log_z", of_no_columns),
        dense=held.get("dense", np.empty((0, vocab_size), np.float32)),
        uniforms=np.empty((num_rows, 0)) if uniforms is None else np.sort(uniforms, axis=1),
    )
    drawn = fill(logits.numpy(), arrays)
    return None if uniforms is None else drawn


def _cores_of(thread: str) -> set[int]:
    """The cores that a thread of this process may run on; none when it has ended meanwhile."""
    try:
        return os.sched_getaffinity(int(thread))
    except ProcessLookupError:
        return set()


def _keep_freed_memory() -> None:
    """Let glibc keep 60 MiB of freed memory; it would give logits back to the system, and fault them in again."""
    # It keeps twice the largest block under 32 MiB that was ever mapped alone and freed (M_TRIM_THRESHOLD, mallopt(3)).
    torch.empty(30 * 2**20, dtype=torch.uint8)


def _a_core_each(num_threads: int) -> ThreadPoolExecutor:
    # vLLM may have bound this thread to one core, which new threads would inherit.
    cores = set().union(*map(_cores_of, os.listdir("/proc/self/task")))
    # Threads that wake each other are drawn to one core, where they would take turns.
    own = [{core} for core in cores] if len(cores) == num_threads else [cores] * num_threads

    def settle() -> None:
        with suppress(OSError):  # a core that was taken from the process meanwhile
            os.sched_setaffinity(0, own.pop())

    return ThreadPoolExecutor(num_threads, thread_name_prefix="capture", initializer=settle)
