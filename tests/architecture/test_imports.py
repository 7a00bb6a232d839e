"""The arrows of the design: which package may import which, which wing which, and where heavy packages are imported."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from benchmarks.support.structure import circles
from tests.support.paths import ROOT

PACKAGES = ("cache", "clients", "student_trainer", "teacher_service")
ALLOWED = {
    "cache": {"cache"},
    "clients": {"cache", "clients"},
    "student_trainer": {"cache", "clients", "student_trainer"},
    "teacher_service": {"cache", "teacher_service"},
}
WINGS = json.loads((ROOT / "tests" / "architecture" / "arrows.json").read_text())
"""A wing, or the modules beside the wings (`cache:vocabulary`), to what it may import beside itself."""
FACE = {"cache", "cache.cache"}
"""Modules beside the vocabulary that hand out what is in the wings."""
HEAVY = {
    "vllm": {
        "teacher_service/engine/vllm_engine.py",
        "teacher_service/engine/lokilm/__init__.py",
        "teacher_service/engine/lokilm/model.py",
        "teacher_service/capture/paths.py",
        "teacher_service/capture/worker.py",
    },
    "ray": {
        "student_trainer/ablate/on_ray.py",
        "student_trainer/launch/failures.py",
        "student_trainer/launch/ray.py",
        "teacher_service/replicas/ray_losses.py",
        "teacher_service/replicas/ray_pool.py",
        "teacher_service/replicas/ray_replica.py",
        "teacher_service/replicas/ray_serve.py",
    },
    "zarr": {
        "cache/store/groups.py",
        "cache/store/chunks.py",
        "cache/store/pipelines.py",
    },
    "obstore": {
        "cache/store/root.py",
        "cache/store/object_ranges.py",
        "cache/store/object_stores.py",
        "cache/store/pipelines.py",
    },
    "numba": {"cache/compiled.py", "teacher_service/capture/cpu/kernel.py"},
    "lm_eval": {"student_trainer/evaluate/tasks/harness.py"},
    "triton": {"student_trainer/losses/triton_rows.py"},
}
NEVER = {"cache": {"torch", "transformers", "vllm", "ray", "fastapi", "httpx", "uvicorn"}, "clients": {"torch", "vllm"}}
MOST_FILES = 20


def sources(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, folder
    return found


def module_of(path: Path) -> str:
    """`cache.store.root` of `cache/store/root.py`; `cache.store` of its `__init__.py`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path) for package in PACKAGES for path in sources(package)}


@cache
def imports_of(path: Path) -> tuple[str, ...]:
    """Imported modules by full name, ours without `potstill.`."""
    return tuple(_imports_of(path))


def _imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("potstill.") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the arrows"
            named = (node.module or "").removeprefix("potstill.")
            for alias in node.names:
                inner = f"{named}.{alias.name}"
                yield inner if inner in MODULES else named


@cache
def packages_of(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports_of(path)}


def wing_of(module: str) -> str:
    """The wing of a module; the settings of all wings of the trainer are one, which its configs are made of."""
    package, *inner = module.split(".")
    if package == "student_trainer":
        return f"{package}:settings" if inner[-1:] == ["settings"] else "/".join([package, *inner[:1]])
    if package == "clients":
        return package
    folder = ROOT.joinpath(package, *inner[:1])
    if inner and folder.is_dir():
        return f"{package}/{inner[0]}"
    if package == "teacher_service":
        return "teacher_service:top"
    return "cache:face" if module in FACE else "cache:vocabulary"


def wing_imports(package: str) -> Iterator[tuple[str, str, str]]:
    """(importing module, its wing, imported wing) where the two wings differ."""
    for path in sources(package):
        module = module_of(path)
        for name in imports_of(path):
            if name in MODULES and wing_of(module) != wing_of(name):
                yield module, wing_of(module), wing_of(name)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_the_arrows_allow(package: str) -> None:
    for path in sources(package):
        used = packages_of(path)
        assert not used & (set(PACKAGES) - ALLOWED[package]), path
        assert not used & NEVER.get(package, set()), path


@pytest.mark.parametrize("package", ["cache", "student_trainer", "teacher_service"])
def test_a_wing_imports_only_what_the_arrows_allow(package: str) -> None:
    against = [
        f"{module} imports {there}" for module, here, there in wing_imports(package) if there not in WINGS.get(here, ())
    ]
    assert not against


def test_the_arrows_between_wings_run_one_way() -> None:
    assert not circles({wing: set(allowed) for wing, allowed in WINGS.items()})


@pytest.mark.parametrize("package", PACKAGES)
def test_no_two_modules_import_each_other(package: str) -> None:
    # A package's `__init__` hands names on: what it imports waits until a name is used.
    arrows = {
        module_of(path): {name for name in imports_of(path) if name in MODULES}
        for path in sources(package)
        if path.name != "__init__.py"
    }
    assert not circles(arrows)


@pytest.mark.parametrize("heavy", HEAVY)
def test_a_heavy_package_is_imported_only_where_the_design_says(heavy: str) -> None:
    users = {str(p.relative_to(ROOT)) for package in PACKAGES for p in sources(package) if heavy in packages_of(p)}
    assert users <= HEAVY[heavy]


def test_no_file_is_long_and_none_is_named_for_nothing() -> None:
    for folder in (*PACKAGES, "tests", "benchmarks"):
        for path in sources(folder):
            assert len(path.read_text().splitlines()) <= 400, path
            assert path.stem not in {"utils", "util", "common", "helpers", "manager"}, path


def test_no_function_is_long() -> None:
    for package in PACKAGES:
        for path in sources(package):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    assert (node.end_lineno or 0) - node.lineno < 50, f"{path}:{node.lineno} {node.name}"


def test_no_folder_is_full() -> None:
    for top in (*PACKAGES, "tests", "benchmarks"):
        folders = {path.parent for path in sources(top)}
        crowded = {folder: len(list(folder.glob("*.py"))) for folder in folders}
        assert not [folder for folder, files in crowded.items() if files > MOST_FILES]


def test_each_wing_says_what_lives_there() -> None:
    for package in PACKAGES:
        for path in sources(package):
            if path.name == "__init__.py":
                assert ast.get_docstring(ast.parse(path.read_text())), path


def test_what_tests_share_is_in_no_test_file() -> None:
    for path in sources("tests"):
        assert not [name for name in imports_of(path) if name.startswith("tests.") and ".test_" in name], path


@pytest.mark.parametrize("package", ["potstill", *(f"potstill.{name}" for name in PACKAGES)])
def test_importing_a_package_stays_fast(package: str) -> None:
    slow = ("torch", "zarr", "vllm", "ray", "transformers", "pyarrow", "fastapi", "obstore", "numba", "httpx")
    code = f"import sys, {package}; print([m for m in {slow!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
