"""Warnings of rows that a teacher would read without the BOS that its tokenizer declares, or with two."""

from __future__ import annotations

from potstill.cache.corpus import Corpus
from potstill.cache.corpus.teacher_tokenizer import TeacherTokenizer
from potstill.cache.plurals import counted
from potstill.cache.types import TeacherIdentity

_ROWS = 256
"""First rows of a corpus that are looked at. The first of each document tells, and the first row is one."""


def prefix_warning(
    teacher: str, corpus: Corpus, identity: TeacherIdentity, tokenizer: TeacherTokenizer | None = None
) -> str:
    """Say in one line what is wrong with the beginning of the rows as a teacher reads them; empty for nothing.

    Args:
        teacher: name of the teacher.
        corpus: the rows.
        identity: of the teacher, with its prefix.
        tokenizer: the teacher's; where it is not at hand, that of the corpus stands for it.
    """
    rows = corpus.rows(0, min(len(corpus), _ROWS))
    prefix = list(identity.prefix_ids)
    if prefix:
        doubled = sum(row[: len(prefix)].tolist() == prefix for row in rows)
        if not doubled:
            return ""
        return (
            f"{teacher} on {corpus.name}: {doubled} of the first {counted(len(rows), 'row')} begin with {prefix} "
            "already, and the teacher's prefix_ids put it in front again; leave the option out"
        )
    bos = (tokenizer or TeacherTokenizer.of(corpus.tokenizer)).bos_id
    if bos is None or any(row[0] == bos for row in rows):
        return ""
    return (
        f"{teacher} on {corpus.name}: the model's tokenizer puts BOS, id {bos}, before every text, but no row "
        f"begins with it; give the teacher the option prefix_ids=[{bos}], or ingest with --prepend-bos"
    )
