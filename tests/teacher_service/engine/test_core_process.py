"""Our part in the process of an engine, tried on processes without one."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys

import psutil
import pytest

from potstill.cache.errors import TeacherFailed
from potstill.teacher_service.engine.core_process import Lifeline, failing_with_the_cause, prepare
from tests.support.waiting import until

SPAWN = multiprocessing.get_context("spawn")


def wait_for_ever(_: Lifeline) -> None:
    print(os.getpid(), flush=True)
    signal.pause()


def fail_to_start(_: Lifeline) -> None:
    try:
        raise OSError("no space\nleft")
    except OSError:
        logging.getLogger("vllm.v1.engine.core").exception("EngineCore failed to start.")
    raise AssertionError("it went on")


PARENT = """
from tests.teacher_service.engine.test_core_process import SPAWN, Lifeline, failing_with_the_cause, wait_for_ever
if __name__ == "__main__":
    with failing_with_the_cause():
        SPAWN.Process(target=wait_for_ever, args=(Lifeline(),)).start()
    import signal
    signal.pause()
"""


def test_an_engine_ends_with_a_parent_that_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    engine = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate()
    until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)


def test_a_start_that_failed_in_another_process_says_why_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    def start() -> None:
        process = SPAWN.Process(target=fail_to_start, args=(Lifeline(),))
        process.start()
        process.join()
        raise RuntimeError("Engine core initialization failed. See root cause above.")

    with pytest.raises(TeacherFailed, match=r"^OSError: no space left$"), failing_with_the_cause():
        start()
    assert capfd.readouterr().err == ""


def test_a_failure_without_a_told_cause_is_left_as_it_is() -> None:
    with pytest.raises(RuntimeError, match="of its own"), failing_with_the_cause():
        raise RuntimeError("of its own")


def test_a_process_that_is_no_engine_of_ours_is_left_alone() -> None:
    before = list(logging.getLogger("vllm.v1.engine.core").filters)
    with failing_with_the_cause():
        prepare()
    assert logging.getLogger("vllm.v1.engine.core").filters == before
