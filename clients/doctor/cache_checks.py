"""Checks of a cache: it can be written, has room, fits the teachers, and holds what they still say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from potstill.cache.errors import NotCommitted, StoreError
from potstill.cache.types import Teacher, TeacherIdentity
from potstill.clients.doctor.findings import Finding, Verdict, finding, found

if TYPE_CHECKING:
    from potstill.cache.cache import Cache

LOOK_AT_STORE = "look at its health, and at the rights of this process there"
_LITTLE_ROOM = 1 << 30  # bytes; a fill writes that much in minutes


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusFacts:
    """The facts of a corpus that must fit a teacher."""

    name: str
    tokenizer_sha256: str
    vocab_size: int
    teachers: tuple[str, ...] = ()
    """Names of the teachers that have targets for it."""
    compared: tuple[str, ...] = ()
    """Names of those whose tokenizer is another one, and whose targets are of the corpus's ids nevertheless."""

    @classmethod
    def of(cls, cache: Cache, name: str) -> CorpusFacts:
        """Read those of one corpus of a cache."""
        sealed, teachers = cache.corpus(name).spec, tuple(cache.teachers(name))
        return cls(
            name=name,
            tokenizer_sha256=sealed.tokenizer_sha256,
            vocab_size=sealed.vocab_size,
            teachers=teachers,
            compared=tuple(cache.compared_teachers(name)),
        )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> CorpusFacts:
        """Read one corpus of the answer of `GET /v1/doctor`."""
        return cls(
            name=str(value.get("name")),
            tokenizer_sha256=str(value.get("tokenizer_sha256")),
            vocab_size=int(value.get("vocab_size", 0)),
            teachers=tuple(map(str, value.get("teachers", ()))),
            compared=tuple(map(str, value.get("compared", ()))),
        )


def unreadable_finding(name: str, where: str, *, kind: str, detail: str) -> Finding:
    """Report a corpus that cannot be read, by the kind and detail of the error."""
    way_out = "run `potstill verify` on the cache; it says what is damaged and how to mend it"
    if kind == StoreError.kind:
        way_out = f"the store did not give it: {LOOK_AT_STORE}"
    return finding("corpus", f"{name} of {where}", Verdict("fail", detail, way_out))


def store_findings(where: str, problem: str, free_bytes: int | None, quota_bytes: int | None) -> list[Finding]:
    """Report the outcome of `potstill.cache.store.probe`, made here or by a service.

    Args:
        where: the cache, for people.
        problem: why the probe object could not be written, read or removed; empty when it could.
        free_bytes: room that is left; None where the store does not say.
        quota_bytes: bytes that the journals may still grow by; None where there are none.
    """
    written = Verdict("ok", "a probe object was written, read and removed")
    if problem:
        written = Verdict("fail", problem, "give the process write access, or name another cache")
    findings = [finding("write access", where, written)]
    if free_bytes is None:
        findings.append(finding("room", where, Verdict("not run", "an object store does not say how much is free")))
        return findings
    room = Verdict("ok", f"{gib(free_bytes)} are free")
    if quota_bytes is not None and free_bytes < quota_bytes:
        way_out = "free some, or lower keep.journal_quota_gib"
        room = Verdict("warn", f"{gib(free_bytes)} are free, less than the journals' {gib(quota_bytes)}", way_out)
    if free_bytes < _LITTLE_ROOM:
        room = Verdict("fail", f"{gib(free_bytes)} are free", "free some: a full disk stops every fill")
    findings.append(finding("room", where, room))
    return findings


def vocabulary_findings(name: str, identity: TeacherIdentity, corpora: Sequence[CorpusFacts]) -> list[Finding]:
    """Check for each corpus that its token ids mean the same to the teacher."""
    if not corpora:
        return [finding("tokenizer", name, Verdict("not run", "there is no corpus to compare with"))]
    others = [corpus for corpus in corpora if corpus.tokenizer_sha256 != identity.tokenizer_sha256]
    return [
        finding(
            "tokenizer", f"{name} on {corpus.name}", _fit(name, identity, corpus, alone=len(others) == len(corpora))
        )
        for corpus in corpora
    ]


def _fit(name: str, identity: TeacherIdentity, corpus: CorpusFacts, *, alone: bool) -> Verdict:
    ours, theirs = identity.tokenizer_sha256, corpus.tokenizer_sha256
    if ours != theirs and name in corpus.compared:
        told = "the tokenizers differ in ids that no row uses, or the targets are projected; see `potstill inspect`"
        return Verdict("ok", told)
    if ours != theirs:
        told = f"the teacher's tokenizer is {ours[:12]}, the corpus' {theirs[:12]}: ids do not mean the same"
        # A cache may well hold corpora of several tokenizers. It is a fault only where this teacher has none that fits,
        # or has targets for one that does not.
        bad = alone or name in corpus.teachers
        way_out = "ingest the corpus with the teacher's tokenizer, under a name of its own"
        return Verdict("fail" if bad else "warn", told, way_out)
    if corpus.vocab_size > identity.vocab_size:
        told = f"the tokenizer has {corpus.vocab_size} ids, the teacher's head only {identity.vocab_size}"
        return Verdict("fail", told, "rows with higher ids are refused: use the model that the tokenizer is of")
    padding = identity.vocab_size - corpus.vocab_size
    told = f"one tokenizer, {corpus.vocab_size} ids"
    if padding:
        told += f"; the teacher's head has {padding} more rows as padding, which a student's loss must mask"
    return Verdict("ok", told)


def name_findings(cache: Cache) -> list[Finding]:
    """Report each teacher's name under which corpora have different teachers' targets."""
    from potstill.cache.targets.names import stored_identities  # noqa: PLC0415 -- heavy

    findings = []
    for name in cache.root.folders("targets"):
        for (first, one), (second, other) in pairwise(stored_identities(cache.root, name).items()):
            differences = one.source.differences(other.source)
            if differences:
                told = f"it is one teacher on {first}, another on {second}: {differences}"
                way_out = "`potstill delete` the targets of one, and fill them under a name of their own"
                findings.append(finding("one name, one teacher", name, Verdict("fail", told, way_out)))
                break
    return findings


async def one_name(cache: Cache, name: str, identity: TeacherIdentity) -> Finding:
    """Check that what the cache holds under the name is this teacher's."""

    async def look() -> Verdict:
        from potstill.cache.journal.segment import SegmentRecord, journal_records  # noqa: PLC0415 -- heavy
        from potstill.cache.targets.names import require_one_identity  # noqa: PLC0415 -- heavy

        require_one_identity(cache.root, name, identity)
        for path in journal_records(cache.root, name):
            record = SegmentRecord.read(cache.root, path)
            differences = record and record.identity.differences(identity)
            if differences:
                told = f"the journal has rows of another teacher under the name, which answer nothing: {differences}"
                way_out = f"`potstill delete --journal --teacher {name}` removes them"
                return Verdict("warn", told, way_out)
        return Verdict("ok", "nothing of another teacher is kept under the name")

    return await found("one name, one teacher", name, look())


async def check_stored(cache: Cache, name: str, teacher: Teacher, tolerance: float) -> list[Finding]:
    """Compare the stored targets of a few rows of each corpus with the teacher's answer of today."""
    corpora = [corpus for corpus in cache.corpora() if name in cache.teachers(corpus)]
    if not corpora:
        return [finding("stored = live", name, Verdict("not run", "the teacher has no targets in the cache"))]
    return [
        await found("stored = live", f"{name} on {corpus}", _stored(cache, name, teacher, corpus, tolerance))
        for corpus in corpora
    ]


async def _stored(cache: Cache, name: str, teacher: Teacher, corpus: str, tolerance: float) -> Verdict:
    from potstill.cache.upkeep import measure_drift  # noqa: PLC0415 -- heavy
    from potstill.cache.upkeep.drift import check_same_vocabulary, sample_rows  # noqa: PLC0415 -- heavy

    targets = cache.targets(name, corpus).top_k_only()
    if targets.fields.alignment:
        return Verdict("not run", "the targets are projected from another corpus, which the teacher cannot answer")
    differences = check_same_vocabulary(targets.identity, teacher.identity)
    if differences:
        way_out = "serve the teacher that the targets are of, or fill under another teacher name"
        return Verdict("fail", f"the stored targets are of another teacher: {differences}", way_out)
    try:
        rows = sample_rows(targets, 2, 0)
    except NotCommitted as error:
        return Verdict("not run", error.detail)
    drift = await measure_drift(teacher, targets, rows)
    told = f"stored rows are {drift.max_abs:.2g} nats at most from what the teacher says now"
    if drift.within(tolerance):
        return Verdict("ok", f"{told}; {drift.encoding} alone may be {drift.bound:.2g}")
    way_out = "the teacher or the cache changed: `potstill verify` says which rows are damaged"
    return Verdict("fail", f"{told}, over {drift.encoding}'s {drift.bound:.2g} and {tolerance:g}", way_out)


def gib(num_bytes: int) -> str:
    """Put a number of bytes into words, in GiB."""
    return f"{num_bytes / 2**30:.1f} GiB"
