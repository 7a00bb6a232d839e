"""The public face of `import potstill`: the names it gives, each alone in a fresh process, and no more."""

from __future__ import annotations

import subprocess
import sys

import pytest

import potstill
from tests.support.paths import ROOT

PUBLIC = ("Cache", "Fields", "HttpCache", "HttpTeacher", "PotstillError", "Targets", "distillation_loss")
"""Names that others depend on: take none away."""


def printed(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.strip()


def test_the_public_names_are_these() -> None:
    assert tuple(dir(potstill)) == PUBLIC
    assert tuple(potstill.__all__) == PUBLIC


def test_each_name_is_importable_in_a_fresh_process() -> None:
    """Each process has imported what others wrote, and nothing of ours."""
    code = (
        "import os, sys, httpx, numpy, pyarrow, torch, zarr\n"
        "assert 'potstill' not in sys.modules\n"
        f"for name in {PUBLIC}:\n"
        "    if not os.fork():\n"
        "        exec(f'from potstill import {name}; print({name}.__name__, flush=True)')\n"
        "        os._exit(0)\n"
        "    os.wait()\n"
    )
    assert tuple(printed(code).split()) == PUBLIC


def test_another_name_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'potstill' has no attribute 'Teacher'"):
        potstill.Teacher  # noqa: B018


def test_importing_it_imports_nothing_yet() -> None:
    code = (
        "import sys; before = set(sys.modules); import potstill; "
        "print(sorted(m for m in set(sys.modules) - before if m.partition('.')[0] not in sys.stdlib_module_names))"
    )
    assert printed(code) == "['potstill']"
