"""A Parquet file with one null among 1,000 texts: what is said, and what is ingested when told to skip it."""

from __future__ import annotations

import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.corpora import byte_tokenizer


def last_line(*more: str) -> str:
    """Run the ingest; the last line that it writes."""
    command = [sys.executable, "-m", "potstill.clients.cli", "ingest", "a.parquet", "--cache", "cache"]
    command += ["--corpus", "docs", "--tokenizer", ".", *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1]


def main() -> None:
    """Ingest it without and with the option."""
    byte_tokenizer().save("tokenizer.json")
    pq.write_table(pa.table({"text": [f"text {n}" if n != 777 else None for n in range(1000)]}), "a.parquet")
    said, skipped = last_line(), last_line("--skip-bad")
    named = "names row 777" if "777" in said else "names no row"
    print(f"{named}; --skip-bad: {'999 documents' if '999 documents' in skipped else skipped[-60:]}")


if __name__ == "__main__":
    main()
