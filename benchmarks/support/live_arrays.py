"""The arrays that are live while some code runs, as PyTorch makes them."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveArrays(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every storage that an operation makes, until nobody holds it any more."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._live: dict[int, tuple[int, torch.dtype]] = {}
        self._bytes = 0
        self._most: Counter[tuple[int, torch.dtype]] = Counter()
        self.largest = 0
        """Elements of the largest array that was made."""
        self.peak_bytes = 0
        """Most bytes that were live at one moment."""

    def most(self, elements: int, dtype: torch.dtype) -> int:
        """Count the arrays of so many elements that were live at one moment, at most."""
        return self._most[elements, dtype]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {self._key(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and self._key(tensor) not in given:
                self._add(tensor)
        return out

    def _add(self, tensor: Tensor) -> None:
        key, storage = self._key(tensor), tensor.untyped_storage()
        kind = (storage.nbytes() // tensor.element_size(), tensor.dtype)
        self.largest = max(self.largest, kind[0])
        self._live[key] = kind
        self._bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self._bytes)
        weakref.finalize(storage, self._forget, key, storage.nbytes())
        self._most[kind] = max(self._most[kind], list(self._live.values()).count(kind))

    def _forget(self, key: int, num_bytes: int) -> None:
        self._live.pop(key, None)
        self._bytes -= num_bytes

    def _key(self, tensor: Tensor) -> int:
        key: int = tensor.untyped_storage()._cdata  # noqa: SLF001 -- what tells storages apart
        return key
