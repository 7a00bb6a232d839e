"""Real text of several kinds and languages, from packages of the system's archive, unpacked to a folder and never kept.

Debian or Ubuntu only (`apt-get download`, `dpkg -x`). The licences of the texts (GPL and GFDL mostly) are why nothing
of them is in this repository.
"""

from __future__ import annotations

import gzip
import html
import json
import random
import re
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGES = ("manpages-de", "manpages-fr", "manpages-zh", "perl-doc", "git-doc")
_COMMENT, _REQUEST = re.compile(r'^[.\']\\".*\n', re.MULTILINE), re.compile(r"^[.']\s*\w* ?", re.MULTILINE)
_ESCAPE = re.compile(r"\\f(?:[A-Z]|\(..)|\\[&/%|^]")
_TAG = re.compile(r"<(?:script|style).*?</(?:script|style)>|<[^>]*>", re.DOTALL)


def fetch(folder: Path) -> None:
    """Download the packages and unpack them into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "usr").exists():
        return
    for package in PACKAGES:
        subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, check=True, stderr=subprocess.DEVNULL)
    for file in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", str(file), str(folder)], check=True)


def kinds(folder: Path) -> dict[str, Callable[[], Iterator[str]]]:
    """Documents of each kind of text that `fetch` unpacked."""
    return {
        "manuals, German": lambda: _manuals(folder / "usr/share/man/de"),
        "manuals, French": lambda: _manuals(folder / "usr/share/man/fr"),
        "manuals, Chinese": lambda: _manuals(folder / "usr/share/man/zh_CN"),
        "Perl's manuals": lambda: _files(folder / "usr/share/perl", "*.pod"),
        "Git's manuals": lambda: (_without_tags(text) for text in _files(folder / "usr/share/doc/git-doc", "*.html")),
        "Python code": lambda: _files(Path(sysconfig.get_paths()["stdlib"]), "*.py"),
    }


def write(folder: Path, out: Path, most_bytes: int) -> dict[str, Path]:
    """Write a JSONL file of each kind, of documents drawn at random up to a size; returns the files."""
    out.mkdir(parents=True, exist_ok=True)
    written = {}
    for kind, documents in kinds(folder).items():
        texts = [text for text in documents() if text.strip()]
        random.Random(0).shuffle(texts)
        path = out / f"{re.sub('[^a-z]+', '-', kind.lower())}.jsonl"
        size = 0
        with path.open("w", encoding="utf-8") as file:
            for text in texts:
                if (size := size + len(text.encode())) > most_bytes:
                    break
                file.write(json.dumps({"text": text, "kind": kind}, ensure_ascii=False) + "\n")
        written[kind] = path
    return written


def _manuals(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.gz")):
        if not path.is_symlink():
            text = _COMMENT.sub("", gzip.decompress(path.read_bytes()).decode("utf-8", "replace"))
            yield _ESCAPE.sub("", _REQUEST.sub("", text)).replace("\\-", "-").replace("\\(", "(")


def _files(folder: Path, pattern: str) -> Iterator[str]:
    for path in sorted(folder.rglob(pattern)):
        if path.is_file() and not path.is_symlink() and "site-packages" not in path.parts:
            yield path.read_text("utf-8", "replace")


def _without_tags(text: str) -> str:
    return html.unescape(_TAG.sub("", text))
