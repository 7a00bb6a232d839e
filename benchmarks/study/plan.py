"""The plan of the study: its texts, sizes, cells and seeds, all of which change its numbers, and its hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

CROSS_ENTROPY, DENSE = "cross-entropy", "dense"
TEACHER, FEWER_DRAWS, SECOND = "smollm2", "smollm2-12", "smollm2-code"
"""Names of teachers in the cache; the second has draws of its own, and is the first otherwise."""


@dataclass(frozen=True, slots=True)
class Package:
    """Files of a Debian package that are documents of one kind."""

    kind: str
    name: str
    ends: tuple[str, ...]
    """Endings of their names, which also say how markup is taken out."""
    under: str = ""
    """Part of their paths."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One way to train a student."""

    name: str
    told: str
    """For readers of the page."""
    baseline: str
    """The cell that it is compared with; its own name for none."""
    train: Mapping[str, Any] = field(default_factory=dict)
    """Keys of `[train]`."""
    teachers: tuple[Mapping[str, Any], ...] = ()
    large: bool = False
    """True for students of the teacher's width."""
    layers: bool = False
    """True for a student that begins as layers of the teacher."""

    @property
    def needs_second(self) -> bool:
        """True if it learns from the second teacher, too."""
        return any(each["name"] == SECOND for each in self.teachers)


def _one(name: str, told: str, loss: str, teacher: str = TEACHER, **of_teacher: Any) -> Cell:
    return Cell(name, told, CROSS_ENTROPY, {"alpha": 1.0, "loss": loss}, ({"name": teacher, **of_teacher},))


def _two(name: str, told: str, **train: Any) -> Cell:
    teachers = ({"name": TEACHER, "k": 64}, {"name": SECOND, "k": 64})
    return Cell(name, told, "top-64", {"alpha": 1.0, **train}, teachers)


def _wide(name: str, told: str, *, layers: bool) -> Cell:
    teachers = ({"name": TEACHER, "k": 64},)
    return Cell(name, told, "wide-random", {"alpha": 1.0}, teachers, large=True, layers=layers)


CELLS = (
    Cell(CROSS_ENTROPY, "no teacher", CROSS_ENTROPY, {"alpha": 0.0}),
    _one("renormalised-12", "top-12 scaled to sum to 1, no tail", "renormalised", k=12),
    _one("draws-50", "50 draws with replacement", "draws"),
    _one("top-64", "top-64 and the mass of the tail, forward KL", "forward_kl", k=64),
    _one("renormalised-64", "top-64 scaled to sum to 1, no tail", "renormalised", k=64),
    _one("top-8", "top-8 and the mass of the tail", "forward_kl", k=8),
    _one("draws-12", "12 draws with replacement", "draws", FEWER_DRAWS),
    _one("hybrid", "top-8 exact, 12 draws for the rest", "hybrid", FEWER_DRAWS, k=8),
    _one("top-32", "top-32 and the mass of the tail", "forward_kl", k=32),
    Cell(
        DENSE,
        "all 49,152 probabilities, forward KL",
        CROSS_ENTROPY,
        {"alpha": 1.0, "dense": True},
        ({"name": TEACHER},),
    ),
    _wide("wide-random", "the teacher's width, random weights, top-64 and tail", layers=False),
    _wide("wide-layers", "the same, begun as two layers of the teacher", layers=True),
    _two("two-fixed", "two teachers, half and half, top-64 and tail"),
    _two("two-by-label", "two teachers, weighted by how likely each finds the label", weighting="label"),
)
"""In the order in which they run: those that take longest come last."""

_MAN, _POD, _TXT, _HTML = (".gz",), (".pod",), (".txt",), (".html",)
PACKAGES = (
    Package("English", "manpages", _MAN, "/man/man"),
    Package("English", "manpages-dev", _MAN, "/man/man"),
    Package("English", "perl-doc", _POD),
    Package("English", "git-doc", _TXT),
    Package("English", "debian-reference-en", _HTML),
    Package("German", "manpages-de", _MAN, "/man/de/"),
    Package("French", "manpages-fr", _MAN, "/man/fr/"),
    Package("Chinese", "manpages-zh", _MAN, "/man/zh_CN/"),
    Package("Python", "libpython3.11-stdlib", (".py",)),
    Package("Go", "golang-1.19-src", (".go",), "/src/"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that changes the numbers of the study, but for the text itself and the machine."""

    seed: int = 20
    """Of the sample, the held-out documents and the draws."""
    packages: tuple[Package, ...] = PACKAGES
    kind_bytes: int = 6_000_000
    """Most bytes of text of one kind."""
    rows: Mapping[str, int] = field(
        default_factory=lambda: {"English": 200, "German": 56, "French": 40, "Chinese": 24, "Python": 88, "Go": 72}
    )
    """Rows of the sample, of so many documents of each kind."""
    row_tokens: int = 256
    held_out: int = 64
    """Of those rows."""
    specialist_rows: Mapping[str, int] = field(default_factory=lambda: {"Python": 64, "Go": 64})
    """Rows that the second teacher is trained on; none is of a document of the sample."""
    specialist_steps: int = 32
    specialist_lr: float = 1e-4
    shard_positions: int = 2048
    k: int = 64
    draws: int = 50
    fewer_draws: int = 12
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 64
    batch_rows: int = 8
    lr: float = 4e-3
    hidden_size: int = 128
    wide_steps: int = 20
    wide_lr: float = 1e-3
    wide_layers: tuple[int, ...] = (0, 29)
    cells: tuple[Cell, ...] = CELLS

    def cell(self, name: str) -> Cell:
        """The cell of a name, which must be there."""
        return next(cell for cell in self.cells if cell.name == name)

    def sha256(self, cell: str, text: str) -> str:
        """Hash what changes the numbers of a cell, in hex, with the text's own hash.

        Further seeds and cells, and other words for readers, leave results as they are.
        """
        shared = {name: value for name, value in asdict(self).items() if name not in ("seeds", "cells")}
        of_cell = {name: value for name, value in asdict(self.cell(cell)).items() if name not in ("told", "baseline")}
        return hashlib.sha256(json.dumps([shared, of_cell, text], sort_keys=True).encode()).hexdigest()
