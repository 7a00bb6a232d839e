"""Facts about the house: crowded folders, arrows and circles between wings, long functions, docstrings, lines.

    python -m benchmarks.support.structure [--before REVISION]

Each fact is measured on the working tree's files and, beside it, on those of a revision.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import subprocess
import sys
import tarfile
import tempfile
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("cache", "clients", "student_trainer", "teacher_service")
LONG_FUNCTION = 50
MOST_FILES = 20
NO_VERB_OR_NOUN = re.compile(r"(Of|Whether|What|Whose|Who|The same|How|Where)\b")
"""Openings of a docstring that leave the reader to guess its subject."""


@dataclass(frozen=True)
class Source:
    """One file of Python, `path` from the root of its tree."""

    path: Path
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """Its syntax."""
        return ast.parse(self.text)

    @property
    def module(self) -> str:
        """Dotted name without `potstill.`: `cache.store.root`."""
        return ".".join(self.path.with_suffix("").parts).removesuffix(".__init__")

    @property
    def wing(self) -> str:
        """The folder below its package, or the package for what stands beside the wings."""
        return "/".join(self.path.parts[: min(2, len(self.path.parts) - 1)])

    @property
    def lines(self) -> int:
        """All lines."""
        return len(self.text.splitlines())

    @cached_property
    def comments(self) -> int:
        """Lines with a comment that is no directive to a tool."""
        read = tokenize.generate_tokens(io.StringIO(self.text).readline)
        found = (token.string for token in read if token.type == tokenize.COMMENT)
        return sum(not re.match(r"#\s*(noqa|type:|!)", comment) for comment in found)

    @cached_property
    def code(self) -> int:
        """Lines that are neither empty, comment nor docstring."""
        prose = {line for node in documented(self.tree) for line in span(docstring(node))}
        kept = enumerate(self.text.splitlines(), 1)
        return sum(bool(line.strip()) and not line.strip().startswith("#") and n not in prose for n, line in kept)

    def imports(self, modules: Mapping[str, Source]) -> set[str]:
        """Modules among `modules` that it imports, anywhere."""
        found = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom):
                named = (node.module or "").removeprefix("potstill.")
                inner = {f"{named}.{alias.name}" for alias in node.names}
                found |= {name for name in inner if name in modules} or {named}
            elif isinstance(node, ast.Import):
                found |= {alias.name.removeprefix("potstill.") for alias in node.names}
        return {name for name in found if name in modules} - {self.module}


def docstring(node: ast.AST) -> ast.Expr | None:
    """The expression that documents a module, class or function, if any."""
    match getattr(node, "body", None):
        case [ast.Expr(value=ast.Constant(value=str())) as first, *_]:
            return first
    return None


def documented(tree: ast.Module) -> Iterator[ast.AST]:
    """Whatever has a docstring, attributes with a string behind them left out."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return (node for node in ast.walk(tree) if isinstance(node, kinds) and docstring(node) is not None)


def span(node: ast.stmt | None) -> range:
    """Line numbers of a statement."""
    return range(0) if node is None else range(node.lineno, (node.end_lineno or node.lineno) + 1)


def long_functions(source: Source) -> Iterator[str]:
    """`file:line name lines` for each function over `LONG_FUNCTION` lines."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and len(span(node)) > LONG_FUNCTION:
            yield f"{source.path}:{node.lineno} {node.name} {len(span(node))} lines"


def circles(arrows: Mapping[str, set[str]]) -> set[str]:
    """Find the modules in circles of imports.

    Modules that import only modules already taken away are taken away, again and again; then the same is done with
    importers, so that a module that merely imports a circle is not counted.
    """
    left = dict(arrows)
    for _ in range(2):
        while done := [name for name, used in left.items() if not used & set(left)]:
            left = {name: used for name, used in left.items() if name not in done}
        turned = {name: {user for user, used in left.items() if name in used} for name in left}
        left = turned
    return set(left)


@dataclass(frozen=True)
class House:
    """The Python files of one tree, and its README."""

    sources: tuple[Source, ...]
    readme: str

    @classmethod
    def at(cls, root: Path) -> House:
        """Read what stands in a folder."""
        tops = (*PACKAGES, "tests", "benchmarks")
        paths = sorted(path for top in tops for path in (root / top).rglob("*.py"))
        return cls(tuple(Source(p.relative_to(root), p.read_text()) for p in paths), (root / "README.md").read_text())

    @cached_property
    def ours(self) -> dict[str, Source]:
        """The four packages, by module."""
        return {source.module: source for source in self.sources if source.path.parts[0] in PACKAGES}

    def lines(self, package: str) -> int:
        """Lines of a package's Python."""
        return sum(source.lines for source in self.sources if source.path.parts[0] == package)

    def wing_arrows(self) -> dict[str, set[str]]:
        """Wing to the wings it imports. A package's face, its `__init__`, hands names on and draws no arrow."""
        arrows: dict[str, set[str]] = defaultdict(set)
        for source in self.ours.values():
            arrows[source.wing] |= set()
            if source.path.name != "__init__.py":
                arrows[source.wing] |= {self.ours[name].wing for name in source.imports(self.ours)} - {source.wing}
        return arrows

    def file_circles(self) -> set[str]:
        """Modules that import each other in a loop."""
        rooms = {name: source for name, source in self.ours.items() if source.path.name != "__init__.py"}
        return circles({name: source.imports(rooms) for name, source in rooms.items()})

    def facts(self) -> dict[str, str]:
        """Each fact, by its name."""
        folders = Counter(source.path.parent for source in self.sources)
        [(crowded, most)] = folders.most_common(1)
        ours = list(self.ours.values())
        nodes = [docstring(node) for source in ours for node in documented(source.tree)]
        texts = [ast.literal_eval(node.value) for node in nodes if node is not None]
        opened = sum(not NO_VERB_OR_NOUN.match(text.strip()) for text in texts)
        code, arrows = sum(source.code for source in ours), self.wing_arrows()
        facts = {
            "most Python files in one folder": f"{most} ({crowded})",
            f"folders over {MOST_FILES} files": str(sum(files > MOST_FILES for files in folders.values())),
            "wings": str(len(arrows)),
            "arrows between wings": str(sum(len(used) for used in arrows.values())),
            "files in circles": str(len(self.file_circles())),
            "README words": str(len(self.readme.split())),
            "README lines over 120 characters": str(sum(len(line) > 120 for line in self.readme.splitlines())),
            f"functions over {LONG_FUNCTION} lines": str(sum(len(list(long_functions(source))) for source in ours)),
            "docstrings that open with a verb or noun": f"{100 * opened / len(texts):.1f} % of {len(texts)}",
            "comments per 100 lines of code": f"{100 * sum(source.comments for source in ours) / code:.1f}",
            "lines of code": f"{code:,}",
        }
        lines = {package: self.lines(package) for package in PACKAGES}
        facts |= {f"lines of {package}/": f"{number:,}" for package, number in lines.items()}
        facts["lines of the four together"] = f"{sum(lines.values()):,}"
        facts |= {f"lines of {top}/": f"{self.lines(top):,}" for top in ("tests", "benchmarks")}
        return facts


def house_of(revision: str) -> House:
    """The house as it stood at a revision."""
    packed = subprocess.run(["git", "archive", revision], cwd=ROOT, capture_output=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            archive.extractall(folder, filter="data")
        return House.at(Path(folder))


def main() -> int:
    """Print the facts; 1 when a folder is crowded, files are in a circle or a function is long."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", metavar="REVISION", help="a revision to show beside it")
    args = parser.parse_args()
    now = House.at(ROOT)
    houses = {"now": now} if args.before is None else {args.before: house_of(args.before), "now": now}
    columns = {name: house.facts() for name, house in houses.items()}
    table = Table("fact", *columns)
    for fact in columns["now"]:
        table.add_row(fact, *(facts.get(fact, "") for facts in columns.values()))
    console = Console()
    console.print(table)
    long = [line for source in now.ours.values() for line in long_functions(source)]
    for line in [*long, *sorted(now.file_circles())]:
        console.print(line)
    crowded = max(Counter(source.path.parent for source in now.sources).values()) > MOST_FILES
    return int(bool(long or now.file_circles() or crowded))


if __name__ == "__main__":
    sys.exit(main())
