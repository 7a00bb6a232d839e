"""What people bring: each numbered case of text, models and settings at the edges, tried by old code and by this.

    python -m benchmarks.bench_edges [--only NUMBER] [--before REVISION]

A case is a file of `benchmarks/edges/`, whose first line says what is tried. It runs as a program of its own, in an
empty folder, with the code of either revision, makes what it needs on the spot, and prints one line: what happened.
"""

from __future__ import annotations

import argparse
import ast
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.abuse.service import HERE, code_of

CASES = Path(__file__).parent / "edges"
_SECONDS = 600


def what(case: Path) -> str:
    """First line of a case's docstring."""
    return (ast.get_docstring(ast.parse(case.read_text(encoding="utf-8"))) or case.stem).splitlines()[0]


def happened(case: Path, tree: Path) -> str:
    """Run a case by the code of `tree`; returns the last line that it prints, or that of its error."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-P", str(case)]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return lines[-1] if lines else f"ended with {done.returncode}"


def main() -> int:
    """Run the cases that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, metavar="NUMBER", help="the cases of this number")
    parser.add_argument("--before", default="", metavar="REVISION", help="also by the code of this revision")
    args = parser.parse_args()
    pattern = f"e{args.only:02}_*.py" if args.only is not None else "e??_*.py"
    cases = sorted(CASES.rglob(pattern), key=lambda case: case.name)
    console = Console(width=160)
    table = Table("#", "tried", *(["before"] if args.before else []), "now", show_lines=True)
    with code_of(args.before) as old:
        for case in cases:
            before = [happened(case, old)] if args.before else []
            found = [case.stem[1:3], what(case), *before, happened(case, HERE)]
            table.add_row(*found)
            console.print(" | ".join(found), highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    return 0 if cases else 1


if __name__ == "__main__":
    sys.exit(main())
