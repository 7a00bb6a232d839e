"""Memory and speed of `potstill ingest`: one long document, a million short ones, conversations, token ids, `.zst`.

    python -m benchmarks.bench_ingest [--megabytes 500] [--documents 1000000] [--tokenizer FOLDER]

Conversations have an eighth of the short documents' number, and are written by the tokenizer's chat template. Sizes are
of what lies on disk, but for `.zst`, whose size is unpacked.

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

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

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


def conversations(path: Path, count: int) -> None:
    """A JSONL file of conversations of four messages of some lines each."""
    lines = (line for text in texts() for line in text.splitlines())
    roles = ("user", "assistant", "user", "assistant")
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            said = ["\n".join(itertools.islice(lines, 8)) for _ in roles]
            messages = [{"role": role, "content": f"{number} {text}"} for role, text in zip(roles, said, strict=True)]
            file.write(json.dumps({"messages": messages}) + "\n")


def token_ids(path: Path, count: int) -> None:
    """A Parquet file of documents of 100 token ids each."""
    rng = np.random.default_rng(0)
    schema = pa.schema({"input_ids": pa.list_(pa.int32())})
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, count, 10_000):
            some = min(10_000, count - start)
            ids = pa.array(rng.integers(0, 10_000, 100 * some, dtype=np.int32))
            offsets = pa.array(np.arange(0, 100 * some + 1, 100, dtype=np.int32))
            writer.write_table(pa.table({"input_ids": pa.ListArray.from_arrays(offsets, ids)}, schema=schema))


def packed(path: Path, source: Path) -> None:
    """A file as `.zst`."""
    with source.open("rb") as file, pa.CompressedOutputStream(str(path), "zstd") as out:
        while block := file.read(1 << 20):
            out.write(block)


def measured(source: Path, tokenizer: str, folder: Path, *options: str) -> tuple[float, int, str]:
    """Ingest in a process of its own; returns seconds, bytes of its peak memory and its last line."""
    command = [sys.executable, "-m", "potstill.clients.cli", "ingest", str(source), "--cache", str(folder / "cache")]
    command += ["--corpus", source.name.replace(".", "-"), "--tokenizer", tokenizer, *options]
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    assert status == 0, output
    return seconds, usage.ru_maxrss * 1024, output.strip().splitlines()[-1]


def main() -> int:
    """Measure each; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=500, help="size of the long document")
    parser.add_argument("--documents", type=int, default=1_000_000, help="number of the short ones")
    parser.add_argument("--tokenizer", help="default: that of the demo's teacher")
    args = parser.parse_args()
    tokenizer = args.tokenizer or str(materialise(default_models_folder()))
    most = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        one_document(folder / "long.txt", args.megabytes)
        many_documents(folder / "short.jsonl", args.documents)
        conversations(folder / "talks.jsonl", max(1, args.documents // 8))
        token_ids(folder / "ids.parquet", args.documents)
        packed(folder / "long.txt.zst", folder / "long.txt")
        options = {"talks.jsonl": ("--messages-field", "messages"), "ids.parquet": ("--ids-field", "input_ids")}
        for name in ("long.txt", "short.jsonl", "talks.jsonl", "ids.parquet", "long.txt.zst"):
            source = folder / name
            seconds, peak, said = measured(source, tokenizer, folder, *options.get(name, ()))
            size = (folder / name.removesuffix(".zst")).stat().st_size
            print(f"{source.name}: {size / 1e6:,.0f} MB in {seconds:,.0f} s, {size / seconds / 1e6:.2f} MB/s,", end=" ")
            print(f"peak {peak / 2**20:,.0f} MiB; {said}", flush=True)
            most = max(most, peak)
    return 1 if most > MAX_BYTES else 0


if __name__ == "__main__":
    sys.exit(main())
