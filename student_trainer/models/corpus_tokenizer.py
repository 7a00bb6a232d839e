"""The corpus's tokenizer, as `transformers` has it beside a model."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from potstill.cache.corpus import Corpus
from potstill.student_trainer.models.architecture import SPECIAL_IDS


def special_ids(corpus: Corpus) -> dict[str, int]:
    """Ids of the tokens that begin, end and pad a text, under the names of a model's config, where they are known."""
    known = corpus.special_tokens
    found = zip(SPECIAL_IDS, (known.bos, known.eos, known.pad), strict=True)
    return {name: token for name, token in found if token is not None}


def save_tokenizer(corpus: Corpus, folder: Path) -> None:
    """Write the tokenizer with all that the corpus keeps of its configuration; `AutoTokenizer` loads it.

    A corpus from before format 3 keeps none: then the tokenizer has no special tokens and no chat template.
    """
    files = corpus.tokenizer_files
    if not files:
        PreTrainedTokenizerFast(tokenizer_object=corpus.tokenizer).save_pretrained(folder)
        return
    # As they were: loaded and saved again, they would be what one version of transformers makes of them.
    corpus.tokenizer.save(str(folder / "tokenizer.json"))
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
