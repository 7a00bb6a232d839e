"""Entries to which a teacher gives no mass, kept as `u8`: what comes back, and what the measured error is of."""

from __future__ import annotations

import numpy as np

from potstill.cache import Targets
from potstill.cache.encoding.logprobs import ENCODINGS, RankTable, decode, encode_measured


def main() -> None:
    """Encode one position: three entries with mass, two without."""
    logprobs = np.array([[-0.1, -2.4, -9.6, -np.inf, -np.inf]])
    logprobs -= np.logaddexp.reduce(logprobs, axis=1)
    exact = Targets(
        ids=np.arange(5, dtype=np.uint32)[None],
        logprobs=logprobs.astype(np.float32),
        log_tail=np.array([-np.inf], np.float32),
        label_logprob=np.array([np.nan], np.float32),
    )
    ranks = RankTable.plain(5)
    stored, error = encode_measured(exact, ENCODINGS["u8"], ranks)
    back = [f"{value:.1f}" for value in decode(stored, ENCODINGS["u8"], ranks).logprobs[0, 3:]]
    print(
        f"-inf comes back as {' and '.join(back)}; max_abs {error.max_abs:.3f} leaves out {error.saturated} saturated"
    )


if __name__ == "__main__":
    main()
