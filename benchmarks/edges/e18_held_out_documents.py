"""Documents of several rows are trained on with a fifth held out: held-out rows whose document is also trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from potstill.student_trainer.train.run import open_run
from tests.support.tiny_runs import ROW_TOKENS, VOCAB, config_of, fill, write_texts_cache

DOCUMENTS = 40


def shared_rows(folder: Path) -> tuple[int, int]:
    """Count the held-out rows, and those of them whose document has a row in the first epoch of training."""
    random = np.random.default_rng(0)
    lengths = random.integers(ROW_TOKENS, 9 * ROW_TOKENS, DOCUMENTS)
    texts = [" ".join(f"w{i}" for i in random.integers(1, VOCAB, length)) for length in lengths]
    root = write_texts_cache(folder, texts)
    fill(root, "fake")
    document_of = np.repeat(np.arange(DOCUMENTS), -(-lengths // ROW_TOKENS))
    with open_run(config_of(root, folder / "run", data={"held_out": 0.2})) as run:
        epoch = sum(map(len, [document_of])) - len(run.held_out)
        trained_on = set(document_of[run.order.take(0, epoch)])
        return len(run.held_out), sum(document in trained_on for document in document_of[run.held_out])


if __name__ == "__main__":
    HELD_OUT, SHARED = shared_rows(Path.cwd())
    print(f"{SHARED} of {HELD_OUT} held-out rows share a document with training")
