"""The face of a cache: open its root, and find its corpora and targets."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Self, TypeVar

from tokenizers import Tokenizer

from potstill.cache.corpus import Corpus
from potstill.cache.corpus.seal import list_corpora
from potstill.cache.encoding.logprobs import encoding_by_name
from potstill.cache.errors import InvalidInput, PotstillError, UnknownCorpus
from potstill.cache.store import Reading, Root
from potstill.cache.targets import SetSpec, TargetSet
from potstill.cache.targets.names import require_one_identity
from potstill.cache.targets.target_set import teachers_with_targets
from potstill.cache.types import Fields, TeacherIdentity

Mode = Literal["r", "r+"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CorporaLook(Generic[T]):
    """Results for each corpus of a cache, by name; a corpus that cannot be read does not hide the others."""

    found: dict[str, T]
    unreadable: dict[str, PotstillError]
    """Errors of the corpora that are damaged, or that the store did not give."""


class Cache:
    """A cache in a local folder or an object store; thread-safe."""

    def __init__(self, root: Root, mode: Mode, reading: Reading) -> None:
        self.root = root
        self.mode = mode
        self._reading = reading
        self._corpora: dict[str, Corpus] = {}

    @classmethod
    def open(
        cls, url: str | Path, mode: Mode = "r", *, chunk_cache_bytes: int = 128 << 20, pipeline: str | None = None
    ) -> Self:
        """Open a cache by path or URL. Mode `r` reads; `r+` writes too, and makes a missing local folder.

        All that is opened through it shares one cache of decoded chunks, of at most `chunk_cache_bytes`, and zarr's
        codec pipeline: `zarrs` when it is installed, else `stock`.

        Raises:
            InvalidInput: the folder does not exist, or the mode or URL scheme is unknown.
            StoreError: the store is denied or not reached.
        """
        if mode not in ("r", "r+"):
            raise InvalidInput(f"mode {mode!r} is unknown; take 'r' to read or 'r+' to write too")
        return cls(Root.open(url, create=mode == "r+"), mode, Reading.open(chunk_cache_bytes, pipeline))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as address and mode, which are opened again; what was opened through the cache is forgotten."""
        return type(self), (self.root, self.mode, self._reading)

    def fresh(self) -> Self:
        """Open the cache again, remembering nothing of what is in it; decoded chunks stay shared."""
        return type(self)(self.root, self.mode, self._reading)

    def corpora(self) -> list[str]:
        """Names of the sealed corpora, sorted."""
        return list_corpora(self.root)

    def look_at_corpora(self, look: Callable[[str], T]) -> CorporaLook[T]:
        """Call `look` with the name of each corpus. One that is not sealed, or deleted meanwhile, is left out.

        Raises:
            StoreError: the store does not list the corpora.
        """
        seen: CorporaLook[T] = CorporaLook({}, {})
        for name in self.root.folders("corpora"):
            try:
                seen.found[name] = look(name)
            except UnknownCorpus:
                continue
            except PotstillError as error:
                seen.unreadable[name] = error
        return seen

    def corpus(self, name: str) -> Corpus:
        """Open a corpus by name; once, as a sealed corpus never changes.

        Raises:
            UnknownCorpus: there is none of this name.
        """
        if name not in self._corpora:
            self._corpora[name] = Corpus.open(self.root, name, self._reading)
        return self._corpora[name]

    def teachers(self, corpus: str) -> list[str]:
        """Names of the teachers with targets for a corpus, complete or not."""
        return teachers_with_targets(self.root, corpus)

    def compared_teachers(self, corpus: str) -> list[str]:
        """Names of those with another tokenizer than the corpus's whose targets are of its ids nevertheless.

        The tokenizers differ only in ids that no row uses, or the targets are projected. Those whose targets cannot be
        read are left out.
        """
        found = []
        for teacher in self.teachers(corpus):
            with suppress(PotstillError):
                targets = self.targets(teacher, corpus)
                if targets.unshared or targets.fields.alignment:
                    found.append(teacher)
        return found

    def targets(self, teacher: str, corpus: str) -> TargetSet:
        """Open a teacher's targets for a corpus.

        Raises:
            UnknownCorpus, UnknownTeacher: there is no such corpus, or the teacher has no targets for it.
        """
        return TargetSet.open(self.root, teacher, self.corpus(corpus), self._reading)

    def plan_targets(
        self,
        teacher: str,
        corpus: str,
        identity: TeacherIdentity,
        *,
        fields: Fields,
        encoding: str = "u8",
        tokenizer: Tokenizer | None = None,
    ) -> TargetSet:
        """Plan the target set that is to be filled so that `fields` are there; see `TargetSet.plan`.

        Raises:
            SpecMismatch: a field is there with other settings, the teacher does not fit the corpus, or its name is
                another teacher's.
            InvalidInput: the cache was opened to read, or the encoding is unknown.
        """
        if self.mode != "r+":
            raise InvalidInput(f"cache {self.root.url!r} was opened to read; open it with mode 'r+' to write")
        spec = SetSpec(identity=identity, fields=fields, encoding=encoding_by_name(encoding))
        planned = TargetSet.plan(self.root, teacher, self.corpus(corpus), spec, self._reading, tokenizer)
        require_one_identity(self.root, teacher, identity)
        return planned
