"""The language of a text, by pycld2 (the extra `data`), and its most frequent words."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache

from potstill.cache.text.words import word_hashes

UNKNOWN = "un"
"""Code of a text of no language that is told, as source code and numbers."""
_READ = 1 << 16
# Its own word for how sure it is calls a seventh of real French manuals unsure, for the names of options in them.
_LEAST_PERCENT = 50

# Of Gopher for English, and as many of the same kind for others.
_STOP_WORDS = {
    "de": "der die und das von zu ist mit",
    "en": "the be to of and that have with",
    "es": "de la que el en y los con",
    "fr": "de la le et les des que est",
    "it": "di che la il un per non con",
    "nl": "de het een van en dat is met",
    "pl": "w i na z do nie się jest",
    "pt": "de que a o e do da com",
    "ru": "в и не на что с по как",
    "sv": "och att det som en på är med",
}
LANGUAGES_WITH_STOP_WORDS = tuple(_STOP_WORDS)


def language_of(text: str) -> str:
    """Code of the language that most of a text's first 65,536 characters are in, or `UNKNOWN`."""
    import pycld2  # noqa: PLC0415 -- an extra's, which what only reads reports does not need

    text = text[:_READ]
    try:
        _, _, found = pycld2.detect(text, isPlainText=True)
    except pycld2.error:  # it refuses control characters
        text = "".join(letter if letter.isprintable() or letter.isspace() else " " for letter in text)
        try:
            _, _, found = pycld2.detect(text, isPlainText=True)
        except pycld2.error:
            return UNKNOWN
    _, code, percent, _ = found[0]
    return str(code) if percent >= _LEAST_PERCENT else UNKNOWN


@cache
def stop_words(language: str) -> Collection[int]:
    """Hashes of a language's stop words; none where there is no list of it."""
    return frozenset(word_hashes(_STOP_WORDS.get(language, "")).tolist())
