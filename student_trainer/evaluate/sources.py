"""Sources of documents, as far as corpora say: the corpus of a mixture, the ingested file, or its folder.

Shape legend:  D documents.
"""

from __future__ import annotations

from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from potstill.cache.corpus import Corpus
from potstill.student_trainer.data.joined import JoinedCorpora

MOST = 12
"""Sources that are told apart: those with most documents, and all others as one."""


def sources_of(corpora: JoinedCorpora, documents: NDArray[np.int64]) -> dict[str, NDArray[np.bool_]]:
    """Tell for each source which of the documents [D] are from it, [D] bool; nothing where there is one source."""
    names, ends = _corpora(corpora) if len(corpora.corpora) > 1 else _files(corpora.corpora[0])
    of = names[np.searchsorted(ends, documents, side="right")]
    found, counts = np.unique(of, return_counts=True)
    if len(found) < 2:
        return {}
    ranked = found[np.argsort(-counts, kind="stable")]
    shown = ranked if len(ranked) <= MOST else ranked[: MOST - 1]
    masks: dict[str, NDArray[np.bool_]] = {str(source): of == source for source in shown}
    if len(shown) < len(ranked):
        masks[f"{len(ranked) - len(shown):,} others"] = ~np.isin(of, shown)
    return masks


def _corpora(corpora: JoinedCorpora) -> tuple[NDArray[np.str_], NDArray[np.int64]]:
    """Names, and one past the last document of each."""
    ends = np.cumsum([len(each.document_rows) - 1 for each in corpora.corpora])
    return np.array([each.name for each in corpora.corpora]), ends


def _files(corpus: Corpus) -> tuple[NDArray[np.str_], NDArray[np.int64]]:
    """Those of the ingested files, or of their folders where each file is one document.

    They are the corpus's alone where nobody said which document is from which file.
    """
    sources = corpus.spec.sources
    ends = np.cumsum([source.documents for source in sources], dtype=np.int64)
    if corpus.spec.num_documents is None or not len(ends) or ends[-1] != corpus.spec.num_documents:
        return np.array([corpus.name]), np.array([corpus.num_documents])
    names = [PurePosixPath(source.name) for source in sources]
    if ends[-1] <= len(sources):
        return np.array([each.parts[0] if len(each.parts) > 1 else corpus.name for each in names]), ends
    return np.array([str(each) for each in names]), ends
