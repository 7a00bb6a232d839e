"""Corpora and teachers that a run names, looked up before torch is imported, which takes many seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from potstill.cache.errors import InvalidInput
from potstill.student_trainer.config import TrainConfig
from potstill.student_trainer.config.run_folder import read_config
from potstill.student_trainer.data.same_tokens import require_tokens_of
from potstill.student_trainer.data.settings import DataConfig
from potstill.student_trainer.data.sources import open_cache


def require_named(config: TrainConfig, corpora: Sequence[str] = ()) -> None:
    """Look for a run's cache, corpora and teachers, and for further corpora.

    Raises:
        InvalidInput: the cache is not there. UnknownCorpus, UnknownTeacher: it has none of a name.
        SpecMismatch: a further corpus has other tokens than the run's.
        PotstillError: whatever else opening them raises.
    """
    own = [each.name for each in config.data.mixture]
    with open_cache(config.data) as cache:
        for name in (*own, *config.data.eval_corpora, *corpora):
            cache.corpus(name)
        for name in corpora:
            require_tokens_of(cache.corpus(name), cache.corpus(own[0]))
        for teacher in config.teachers:
            for name in own if teacher.source == "cache" else ():
                cache.targets(teacher.name, name)


def require_corpora(cache: str, names: Sequence[str]) -> None:
    """Look for corpora, of which there is one at least, in a cache; raises as `require_named` does."""
    with open_cache(DataConfig(cache=cache, corpus=names[0])) as opened:
        for name in names:
            opened.corpus(name)


def require_to_judge(run: Path, cache: str | None, corpora: Sequence[str], *, rows_needed: bool) -> None:
    """Look for what a run is judged by; the arguments are those of `run_to_judge`.

    Raises:
        InvalidInput: there is nothing. PotstillError: whatever `require_named` raises.
    """
    config = read_config(run, cache)
    if rows_needed:
        require_rows(run, config, corpora)
    require_named(config, corpora)


def require_rows(run: Path | str, config: TrainConfig, corpora: Sequence[str] = ()) -> None:
    """Check that a run holds rows out, or has other corpora to be judged by.

    Raises:
        InvalidInput: neither.
    """
    shares = [config.data.held_out if each.held_out is None else each.held_out for each in config.data.mixture]
    if not any(shares) and not config.data.eval_corpora and not corpora:
        raise InvalidInput(
            f"run {str(run)!r} has no held-out rows: its data.held_out is 0, and it has no data.eval_corpora; name a "
            "corpus by --corpus"
        )
