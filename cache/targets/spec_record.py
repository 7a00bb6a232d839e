"""The record of a segment set's spec, `<set>/zarr.json`: created if absent, then only compared."""

from __future__ import annotations

import hashlib

from potstill.cache.corpus import Corpus
from potstill.cache.errors import SpecMismatch
from potstill.cache.store import Root
from potstill.cache.store.record import group_metadata
from potstill.cache.targets.set_spec import SetSpec, parse_spec, require_same


class SpecRecord:
    """The spec of one segment set, and the bytes that it is stored in once the set is begun."""

    def __init__(self, root: Root, path: str, corpus: Corpus, spec: SetSpec) -> None:
        self.root = root
        self.path = path
        self.corpus = corpus
        self.spec = spec
        self.sha256 = ""
        """Hash of the record's bytes; empty until the record was seen."""

    @classmethod
    def open(cls, root: Root, path: str, corpus: Corpus) -> SpecRecord | None:
        """Open the record of the set at `path`; None when there is none.

        Raises:
            SpecMismatch: it was made for another corpus of this name. FormatError, CorruptSegment: it is damaged.
        """
        data = root.get(f"{path}/zarr.json")
        if data is None:
            return None
        opened = cls(root, path, corpus, parse_spec(path, data, corpus))
        opened.sha256 = hashlib.sha256(data).hexdigest()
        return opened

    @property
    def stores_ids(self) -> bool:
        """True when the set stores ids, and so needs a rank table."""
        return bool(self.spec.fields.k or self.spec.fields.draws)

    def is_begun(self) -> bool:
        """Tell whether the record exists.

        Raises:
            SpecMismatch: another job made the set with another spec since this one was planned.
        """
        if not self.sha256:
            data = self.root.get(f"{self.path}/zarr.json")
            if data is None:
                return False
            require_same(self.path, self.spec, parse_spec(self.path, data, self.corpus))
            self.sha256 = hashlib.sha256(data).hexdigest()
        return True

    def publish(self) -> None:
        """Create the record, unless it exists.

        Raises:
            SpecMismatch: the set exists with another spec. StoreError: the store is full or cannot be written.
        """
        if self.is_begun():
            return
        record = {
            "teacher": self.path.split("/")[1],
            "corpus": {"name": self.corpus.name, "fingerprint": self.corpus.fingerprint},
            "identity": self.spec.identity.to_json(),
            "fields": self.spec.fields.to_json(),
            "encoding": self.spec.encoding.to_json(),
        }
        self.root.create(f"{self.path}/zarr.json", group_metadata("targets", record))
        # Whoever won the race, the record that is there now decides.
        begun = self.is_begun()
        assert begun, "a created spec cannot vanish"

    def require_unchanged(self) -> None:
        """Check that the set is still the one that was begun.

        Raises:
            SpecMismatch: it was deleted meanwhile, and perhaps begun anew.
        """
        data = self.root.get(f"{self.path}/zarr.json")
        if data is None or hashlib.sha256(data).hexdigest() != self.sha256:
            raise SpecMismatch(
                f"{self.path} was deleted while it was filled; run the same command again to fill it anew"
            )
