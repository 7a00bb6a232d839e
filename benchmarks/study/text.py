"""The study's text: documents of Debian packages, unpacked beside the study and never installed or shipped."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.study.markup import text_of
from benchmarks.study.plan import Package, Plan
from potstill.cache.errors import InvalidInput
from potstill.student_trainer.config.run_folder import write_json

_SHORTEST = 1500
"""Characters below which a document is left out: most would have no whole row."""


def prepare_text(plan: Plan, folder: Path) -> dict[str, Any]:
    """Write `text/KIND.jsonl`, one document a line, and return the manifest, which is there on the next call.

    Raises:
        InvalidInput: a package cannot be got, or has no text.
    """
    file = folder / "text.json"
    if not file.exists():
        write_json(file, _written(plan, folder))
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _written(plan: Plan, folder: Path) -> dict[str, Any]:
    (folder / "text").mkdir(parents=True, exist_ok=True)
    for package in plan.packages:
        unpack(package, folder)
    kinds = {}
    for kind in dict.fromkeys(package.kind for package in plan.packages):
        lines = list(_chosen(plan, kind, folder))
        if not lines:
            raise InvalidInput(f"the packages of kind {kind!r} have no text; unpack others, or take the kind out")
        data = "".join(f"{line}\n" for line in lines).encode()
        (folder / "text" / f"{kind}.jsonl").write_bytes(data)
        kinds[kind] = {"documents": len(lines), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return {"seed": plan.seed, "packages": [package.name for package in plan.packages], "kinds": kinds}


def text_sha256(manifest: dict[str, Any]) -> str:
    """Hash the hashes of all kinds."""
    kinds = {kind: each["sha256"] for kind, each in manifest["kinds"].items()}
    return hashlib.sha256(json.dumps(kinds, sort_keys=True).encode()).hexdigest()


def unpack(package: Package, folder: Path) -> Path:
    """Get a package and unpack it to `root/NAME`, where it is not there yet.

    Raises:
        InvalidInput: `apt-get` or `dpkg` does not give it.
    """
    root, debs = folder / "root" / package.name, folder / "debs"
    if root.is_dir():
        return root
    debs.mkdir(parents=True, exist_ok=True)
    try:
        if not any(debs.glob(f"{package.name}_*.deb")):
            subprocess.run(["apt-get", "download", package.name], cwd=debs, check=True, capture_output=True)
        deb = next(debs.glob(f"{package.name}_*.deb"))
        half = root.with_name(f".{package.name}")
        subprocess.run(["dpkg", "-x", deb, half], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise InvalidInput(
            f"Debian's package {package.name!r} cannot be got ({error}); unpack it into {str(root)!r} by hand"
        ) from error
    half.rename(root)
    return root


def _chosen(plan: Plan, kind: str, folder: Path) -> Iterator[str]:
    """Give documents as JSON in the order of a seeded hash of their names, up to the bytes of a kind."""
    named: dict[str, Path] = {}
    for package in plan.packages:
        root = folder / "root" / package.name
        if package.kind == kind:
            names = ((file, f"{package.name}/{file.relative_to(root)}") for file in root.rglob("*"))
            named |= {name: file for file, name in names if _is_document(package, file, name)}
    seen, size = set(), 0
    for name in sorted(named, key=lambda name: hashlib.sha256(f"{plan.seed} {name}".encode()).digest()):
        text = text_of(named[name])
        mark = hashlib.sha256(text.encode()).digest()
        if len(text) < _SHORTEST or mark in seen:
            continue
        seen.add(mark)
        size += len(text.encode())
        if size > plan.kind_bytes:
            return
        yield json.dumps({"text": text, "name": name}, ensure_ascii=False)


def _is_document(package: Package, file: Path, name: str) -> bool:
    wanted = name.endswith(package.ends) and package.under in name and "/testdata/" not in name
    return wanted and not file.is_symlink() and file.is_file()
