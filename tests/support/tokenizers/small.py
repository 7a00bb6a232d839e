"""Small tokenizers that are trained on the spot, and a teacher that never leaves its tokenizer's own spelling."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

LETTERS = "abc "


def trained(texts: Iterable[str], vocab_size: int, *, words: bool = True) -> Tokenizer:
    """Byte-level BPE; with `words`, no token goes on behind a word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def of_letters(merges: Iterable[tuple[str, str]]) -> Tokenizer:
    """Byte-level BPE with few merges, whose rest of the vocabulary is bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: token for token, char in enumerate(alphabet)}
    pairs = [(a.replace(" ", "\u0120"), b.replace(" ", "\u0120")) for a, b in merges]
    for a, b in pairs:
        vocab.setdefault(a + b, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def piece(tokenizer: Tokenizer, token: int) -> str:
    """Write a token as the vocabulary does."""
    found = tokenizer.id_to_token(token)
    assert found is not None, token
    return found


class PairTeacher:
    """A teacher whose next token depends on the last alone; only pairs that its tokenizer would write have mass."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self.vocab_size = tokenizer.get_vocab_size()
        spelt = {token: text.replace("\u0120", " ") for text, token in tokenizer.get_vocab().items()}
        self.texts = {token: text for token, text in spelt.items() if set(text) <= set(LETTERS)}
        pairs = [(a, b) for a in self.texts for b in self.texts]
        encoded = tokenizer.encode_batch([self.texts[a] + self.texts[b] for a, b in pairs], add_special_tokens=False)
        self.nexts: dict[int, dict[int, float]] = {}
        rng = np.random.default_rng(seed)
        for a in self.texts:
            fit = [b for (first, b), each in zip(pairs, encoded, strict=True) if first == a and each.ids == [a, b]]
            self.nexts[a] = dict(zip(fit, rng.dirichlet(np.full(len(fit), 2.0)).tolist(), strict=True))

    def logprobs(self, token: int) -> NDArray[np.float64]:
        """[V] after a token."""
        mass = np.zeros(self.vocab_size)
        mass[list(self.nexts[token])] = list(self.nexts[token].values())
        with np.errstate(divide="ignore"):
            return np.log(mass)

    def write(self, num_tokens: int, seed: int) -> list[int]:
        """Draw a text."""
        rng = np.random.default_rng(seed)
        found = [next(iter(self.texts))]
        while len(found) < num_tokens:
            after = self.nexts[found[-1]]
            found.append(int(rng.choice(list(after), p=list(after.values()))))
        return found

    def continuations(self, token: int, num_bytes: int) -> dict[str, float]:
        """Probability of each text that the tokens after this one spell, up to one that has so many bytes."""
        found: dict[str, float] = {}

        def go_on(last: int, text: str, mass: float) -> None:
            if len(text) >= num_bytes:
                found[text] = found.get(text, 0.0) + mass
                return
            for each, share in self.nexts[last].items():
                if share * mass > 0:
                    go_on(each, text + self.texts[each], mass * share)

        go_on(token, "", 1.0)
        return found
