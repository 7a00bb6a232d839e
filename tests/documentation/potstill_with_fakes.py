"""The `potstill` command with a fake in place of vLLM: `python -m tests.documentation.potstill_with_fakes ARGUMENTS`.

The entry point `vllm` of its own is the last of that name on the path, so the factory for model folders is the one
below. Everything else is the real command.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from potstill.cache.corpus.tokenizer import fingerprint, load_tokenizer
from potstill.cache.types import JSON, Teacher
from potstill.clients.cli import main
from potstill.teacher_service.engine.vllm_teacher import VllmOptions
from tests.support.fakes import FakeTeacher, fake_identity

INSTALLED = Path(__file__).parent / "fakes_installed"
"""A folder for the path, with what an installed package has beside its modules."""


@asynccontextmanager
async def open_fake(spec: str, *, options: Mapping[str, JSON] | None = None) -> AsyncIterator[Teacher]:
    """A fake with the vocabulary and the tokenizer of the model folder `spec`; options are those of vLLM."""
    VllmOptions.from_json(spec, options or {})
    tokenizer = load_tokenizer(spec)
    vocab_size = json.loads((Path(spec) / "config.json").read_text())["vocab_size"]
    yield FakeTeacher(
        fake_identity(vocab_size=vocab_size, tokenizer_sha256=fingerprint(tokenizer), model=Path(spec).name)
    )


@contextmanager
def fakes_in_place_of_vllm() -> Iterator[None]:
    """Open a fake for every model folder that is named to a command of this process meanwhile."""
    folder = str(INSTALLED)
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def serve_with_fakes(folder: Path, line: str) -> int:
    """Run the line, a `potstill serve`, in a folder; returns its exit status."""
    os.chdir(folder)
    with fakes_in_place_of_vllm():
        return main(shlex.split(line)[1:])


if __name__ == "__main__":
    with fakes_in_place_of_vllm():
        sys.exit(main())
