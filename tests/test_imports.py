"""The arrows of the design: cache <- clients <- student_trainer, cache <- teacher_service; few heavy imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cache", "clients", "student_trainer", "teacher_service")
ALLOWED = {
    "cache": {"cache"},
    "clients": {"cache", "clients"},
    "student_trainer": {"cache", "clients", "student_trainer"},
    "teacher_service": {"cache", "teacher_service"},
}
HEAVY = {
    "vllm": {
        "teacher_service/vllm_engine.py",
        "teacher_service/capture_paths.py",
        "teacher_service/capture_worker.py",
    },
    "ray": {
        "student_trainer/ray_train.py",
        "teacher_service/ray_losses.py",
        "teacher_service/ray_pool.py",
        "teacher_service/ray_replica.py",
        "teacher_service/ray_serve.py",
    },
    "zarr": {"cache/groups.py", "cache/chunks.py", "cache/pipelines.py"},
    "obstore": {"cache/store.py", "cache/object_stores.py", "cache/pipelines.py"},
    "numba": {"cache/compiled.py", "teacher_service/capture_kernel.py"},
}
NEVER = {"cache": {"torch", "transformers", "vllm", "ray", "fastapi", "httpx", "uvicorn"}, "clients": {"torch", "vllm"}}


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the arrows"
            yield (node.module or "").split(".")[0]


def sources(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, package
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_the_arrows_allow(package: str) -> None:
    for path in sources(package):
        used = set(imports_of(path))
        assert not used & (set(PACKAGES) - ALLOWED[package]), path
        assert not used & NEVER.get(package, set()), path


@pytest.mark.parametrize("heavy", HEAVY)
def test_a_heavy_package_is_imported_only_where_the_design_says(heavy: str) -> None:
    users = {str(p.relative_to(ROOT)) for package in PACKAGES for p in sources(package) if heavy in imports_of(p)}
    assert users <= HEAVY[heavy]


def test_no_file_is_long_and_none_is_named_for_nothing() -> None:
    for folder in (*PACKAGES, "tests", "benchmarks"):
        for path in sources(folder):
            assert len(path.read_text().splitlines()) <= 400, path
            assert path.stem not in {"utils", "util", "common", "helpers", "manager"}, path


def test_what_tests_share_is_in_no_test_file() -> None:
    for path in sources("tests"):
        modules = {
            node.module or "" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)
        }
        assert not [module for module in modules if module.startswith("tests.test_")], path


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_stays_fast(package: str) -> None:
    slow = ("torch", "zarr", "vllm", "ray", "transformers", "pyarrow", "fastapi", "obstore", "numba")
    code = f"import sys, {package}; print([m for m in {slow!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
