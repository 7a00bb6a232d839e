"""Token ids in Parquet, JSONL, a folder of `datasets`, nanoGPT's `.bin`, Megatron's `.idx`: which are taken."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from tests.support.corpora import byte_tokenizer

IDS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]


def make_sources() -> None:
    """Write the same three documents in each form."""
    pq.write_table(pa.table({"input_ids": IDS}), "ids.parquet")
    Path("ids.jsonl").write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in IDS))
    Dataset.from_dict({"input_ids": IDS}).save_to_disk("saved")
    flat = np.array([token for ids in IDS for token in ids], "<u2")
    flat.tofile("raw.bin")
    flat.tofile("indexed.bin")
    lengths = np.array([len(ids) for ids in IDS], np.int32)
    pointers = 2 * np.concatenate([[0], np.cumsum(lengths[:-1])]).astype(np.int64)
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 3, 4)
    Path("indexed.idx").write_bytes(head + lengths.tobytes() + pointers.tobytes() + np.arange(4).tobytes())


def taken(source: str, *more: str) -> bool:
    """Ingest a source; True where all nine tokens are in the corpus."""
    command = [sys.executable, "-m", "potstill.clients.cli", "ingest", source, "--cache", "cache"]
    command += ["--corpus", Path(source).name.replace(".", "-"), "--tokenizer", ".", *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode == 0 and ": 9 positions" in done.stdout


def main() -> None:
    """Ingest each form."""
    byte_tokenizer().save("tokenizer.json")
    make_sources()
    field = ("--ids-field", "input_ids")
    found = {name: taken(name, *field) for name in ("ids.parquet", "ids.jsonl", "saved")}
    found |= {name: taken(name) for name in ("raw.bin", "indexed.bin")}
    print(f"{sum(found.values())} of {len(found)} forms are taken")


if __name__ == "__main__":
    main()
