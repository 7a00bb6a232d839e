"""`potstill serve` with a fake teacher, by the code that PYTHONPATH names: `python -P served.py CONFIG.toml`.

The teacher `fake://N` has a vocabulary of N tokens, and computes in threads as an engine of its own would.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from potstill.cache import Fields, Targets
from potstill.cache.corpus.tokenizer import fingerprint
from potstill.cache.types import Tokens
from potstill.clients.cli import main
from tests.support.corpora import byte_tokenizer
from tests.support.fakes import FakeTeacher, fake_identity


class ThreadedTeacher(FakeTeacher):
    """A fake whose computing does not hold up the service's event loop."""

    async def score(self, rows: Sequence[Tokens], want: Fields) -> list[Targets]:
        return await asyncio.to_thread(lambda: [self.targets(row, want) for row in rows])


@asynccontextmanager
async def open_fake(spec: str, *, options: Mapping[str, Any] | None = None) -> AsyncIterator[FakeTeacher]:
    """Open the teacher `fake://N`; it has no options."""
    assert not options, options
    size = int(spec.removeprefix("fake://"))
    yield ThreadedTeacher(fake_identity(vocab_size=size, tokenizer_sha256=fingerprint(byte_tokenizer())))


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        package = Path(folder) / "abuse-0.dist-info"
        package.mkdir()
        (package / "METADATA").write_text("Metadata-Version: 2.1\nName: abuse\nVersion: 0\n")
        (package / "entry_points.txt").write_text("[potstill.teachers]\nfake = served:open_fake\n")
        sys.path += [folder, str(Path(__file__).parent)]
        sys.exit(main(["serve", *sys.argv[1:]]))
