"""Tokenizers as `transformers` has them beside a model; of a student, the corpus's."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from potstill.cache.corpus import Corpus
from potstill.cache.errors import InvalidInput
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


def model_tokenizer(config: PretrainedConfig, corpus: Corpus) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a student of this config as `AutoTokenizer` loads it from the student's published folder.

    Raises:
        InvalidInput: it loads none from there.
    """
    with TemporaryDirectory() as folder:
        # The class of the tokenizer may depend on that of the model.
        config.save_pretrained(folder)
        save_tokenizer(corpus, Path(folder))
        return load_model_tokenizer(folder)


def load_model_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside a model, a folder or a name on the hub.

    Raises:
        InvalidInput: `AutoTokenizer` loads none.
    """
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InvalidInput(f"{model!r} has no tokenizer that transformers loads: {reason}") from error
