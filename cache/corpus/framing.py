"""What stands around a document: the token that begins texts, and the one that ends them.

Shape legend:  T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from potstill.cache.corpus.plan import Found
from potstill.cache.corpus.tokenizer_files import SpecialTokens
from potstill.cache.errors import InvalidInput
from potstill.cache.types import Tokens

_NONE = np.empty(0, np.uint32)


class Frame:
    """Puts BOS before documents and EOS behind them where they are not there yet, and counts where they were.

    Raises:
        InvalidInput: the tokenizer's files name no such token.
    """

    def __init__(self, special: SpecialTokens, found: Found, *, prepend_bos: bool, append_eos: bool) -> None:
        for wanted, option, token, name in (
            (prepend_bos, "--prepend-bos", special.bos, "bos_token"),
            (append_eos, "--append-eos", special.eos, "eos_token"),
        ):
            if wanted and token is None:
                raise InvalidInput(
                    f"{option} needs a {name}, and no file beside the tokenizer names one; add it to "
                    "tokenizer_config.json in its folder"
                )
        self._bos = special.bos
        self._prepend = prepend_bos
        self._eos = special.eos if append_eos else None
        self._found = found

    def around(self, blocks: Iterable[Tokens]) -> Iterator[Tokens]:
        """Frame a document that comes in blocks [T] uint32; one without tokens stays so."""
        last = _NONE
        for block in blocks:
            if not len(block):
                continue
            if not len(last):
                yield self._front(int(block[0]))
            yield block
            last = block
        if len(last):
            yield self._back(int(last[-1]))

    def ends(self, ids: Tokens) -> tuple[Tokens, Tokens]:
        """Give the tokens that are to stand before and behind a document [T] uint32."""
        return (self._front(int(ids[0])), self._back(int(ids[-1]))) if len(ids) else (_NONE, _NONE)

    def _front(self, first: int) -> Tokens:
        if self._bos is None:
            return _NONE
        if first == self._bos:
            self._found.began_with_bos += 1
            return _NONE
        return np.array([self._bos], np.uint32) if self._prepend else _NONE

    def _back(self, last: int) -> Tokens:
        if self._eos is None:
            return _NONE
        if last == self._eos:
            self._found.ended_with_eos += 1
            return _NONE
        return np.array([self._eos], np.uint32)
