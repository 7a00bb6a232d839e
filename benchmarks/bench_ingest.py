"""Memory and speed of `potstill ingest`: one long document, a million short ones.

    python -m benchmarks.bench_ingest [--megabytes 500] [--documents 1000000] [--tokenizer FOLDER]

Text is that of the standard library's sources, repeated with a number before each file so that no two rows are alike.
Each ingest is a process of its own; its memory is the peak of what is resident. Exits 1 when one needs over 1 GiB.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from potstill.student_trainer.demo.smollm2 import default_models_folder, materialise

MAX_BYTES = 2**30


def texts() -> Iterator[str]:
    """Endless text in files of some kilobytes, each with its number in front."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    contents = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    for number, text in enumerate(itertools.cycle(contents)):
        yield f"{number}\n{text}"


def one_document(path: Path, megabytes: int) -> None:
    """A text file of this size."""
    with path.open("w", encoding="utf-8") as file:
        for text in texts():
            file.write(text)
            if file.tell() >= megabytes * 10**6:
                return


def many_documents(path: Path, count: int) -> None:
    """A JSONL file of short documents, of 1 to 12 lines each."""
    lines = (line for text in texts() for line in text.splitlines())
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            text = "\n".join(itertools.islice(lines, 1 + number % 12))
            file.write(json.dumps({"text": f"{number} {text}"}) + "\n")


def measured(source: Path, tokenizer: str, folder: Path) -> tuple[float, int, str]:
    """Ingest in a process of its own; returns seconds, bytes of its peak memory and its last line."""
    command = [sys.executable, "-m", "potstill.clients.cli", "ingest", str(source), "--cache", str(folder / "cache")]
    command += ["--corpus", source.stem, "--tokenizer", tokenizer]
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    assert status == 0, output
    return seconds, usage.ru_maxrss * 1024, output.strip().splitlines()[-1]


def main() -> int:
    """Measure both; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=500, help="size of the long document")
    parser.add_argument("--documents", type=int, default=1_000_000, help="number of the short ones")
    parser.add_argument("--tokenizer", help="default: that of the demo's teacher")
    args = parser.parse_args()
    tokenizer = args.tokenizer or str(materialise(default_models_folder()))
    most = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one_document(folder / "long.txt", args.megabytes)
        many_documents(folder / "short.jsonl", args.documents)
        for source in (folder / "long.txt", folder / "short.jsonl"):
            seconds, peak, said = measured(source, tokenizer, folder)
            size = source.stat().st_size
            print(f"{source.name}: {size / 1e6:,.0f} MB in {seconds:,.0f} s, {size / seconds / 1e6:.2f} MB/s,", end=" ")
            print(f"peak {peak / 2**20:,.0f} MiB; {said}", flush=True)
            most = max(most, peak)
    return 1 if most > MAX_BYTES else 0


if __name__ == "__main__":
    sys.exit(main())
