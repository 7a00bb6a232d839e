"""`python -m potstill.cache.encoding.archive` compiles this codec and keeps the code on disk, as its first use would.

That takes half a minute of one core, which a container image or a machine's set-up pays once and its processes do not.
"""

from __future__ import annotations

import numpy as np

from potstill.cache.encoding.archive.blocks import Context
from potstill.cache.encoding.archive.codec import pack_draws, pack_top_k, unpack_draws, unpack_top_k
from potstill.cache.encoding.archive.codes import DrawCodes, TopKCodes

_VOCAB_SIZE, _K, _POSITIONS = 8, 2, 4


def main() -> None:
    """Pack and unpack a small block of each kind, for which numba compiles all that larger ones need."""
    tokens = np.arange(_POSITIONS, dtype=np.uint32)
    context = Context(tokens=tokens, labels=tokens, begins_row=tokens == 0)
    codes = TopKCodes(
        ids=np.tile(np.arange(_K, dtype=np.uint32), (_POSITIONS, 1)),
        gaps=np.ones((_POSITIONS, _K - 1), dtype=np.uint8),
        log_tail=np.full(_POSITIONS, -1, dtype=np.float16),
        label_logprob=np.full(_POSITIONS, -2, dtype=np.float16),
        label_entry=np.full(_POSITIONS, -1, dtype=np.int16),
    )
    unpack_top_k(pack_top_k(codes, context, _VOCAB_SIZE), context, _K, _VOCAB_SIZE)
    drawn = DrawCodes(
        lengths=np.ones(_POSITIONS, dtype=np.uint16),
        ids=tokens,
        counts=np.full(_POSITIONS, 3, dtype=np.uint16),
    )
    unpack_draws(pack_draws(drawn, context, 3, _VOCAB_SIZE), context, 3, _VOCAB_SIZE)


if __name__ == "__main__":
    main()
