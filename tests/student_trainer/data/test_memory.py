from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
if len(sys.argv) > 1:
    from potstill.student_trainer.data.memory import keep_freed_memory
    keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        batch = [np.ones((1024, 512), np.float32) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries have no such setting")
def test_arrays_of_the_next_batch_take_the_memory_of_the_last() -> None:
    def measured(*args: str) -> int:
        return int(subprocess.run([sys.executable, "-c", FAULTS, *args], check=True, capture_output=True).stdout)

    # Four arrays of 2 MiB are 2,048 pages.
    assert measured("kept") < 2048 < measured()
