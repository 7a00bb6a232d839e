"""Which tests share a process of `pytest -n`, and in what order the groups of them begin."""

from __future__ import annotations

from fnmatch import fnmatch

import pytest
from xdist.scheduler import LoadScopeScheduling

SHARING = {
    "ray_mark": ("*/test_ray*.py",),
    "vllm_teacher": ("*/test_vllm_*.py", "*/test_teacher_contract.py"),
}
"""The files whose tests use what takes long to start and is started once a process, by its fixture."""

LONG = (
    "ray_mark",  # mostly waits, so that the other processes have the cores
    "vllm_teacher",
    "tests/student_trainer/train/test_loop.py",
    "tests/cache/upkeep/test_verify.py",
    "tests/cache/journal/test_journal.py",
    "tests/cache/projection/test_projection.py",
    "tests/cache/store/test_s3.py",
    "tests/documentation/test_pages.py",
    "tests/cache/journal/test_compact.py",
    "tests/cache/targets/test_segment_set.py",
    "tests/student_trainer/train/test_losses_of_runs.py",
    "tests/student_trainer/train/test_http.py",
    "tests/cache/fill/test_fill.py",
    "tests/cache/upkeep/test_delete.py",
    "tests/cache/upkeep/test_estimate.py",
)
"""Groups that take twenty seconds or more: they begin first, so that no process is left alone with one at the end."""


def group_of(nodeid: str) -> str:
    """The tests of a file share a process, for their fixtures; so do all that share what takes long to start."""
    file = nodeid.partition("::")[0]
    return next((name for name, files in SHARING.items() if any(fnmatch(file, one) for one in files)), file)


def place_of(nodeid: str) -> int:
    """The place of a test's group in `LONG`, or behind all of them if it is not there."""
    group = group_of(nodeid)
    return LONG.index(group) if group in LONG else len(LONG)


def check(item: pytest.Item) -> None:
    """Refuse a test that would start a second Ray or engine in another process."""
    for fixture, files in SHARING.items():
        if fixture in getattr(item, "fixturenames", ()) and group_of(item.nodeid) != fixture:
            raise pytest.UsageError(f"{item.nodeid} uses {fixture}; its file must match one of {', '.join(files)}")


class GroupScheduling(LoadScopeScheduling):  # type: ignore[misc]
    """Hands out whole groups in the order of collection, to whichever process has little left to do.

    `--dist loadgroup` does the same by marks, but not since pytest 9.2, of which xdist 3.8 does not know how to name
    the groups to it.
    """

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)
