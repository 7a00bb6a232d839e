"""What is wanted of the fields that are kept: checked in one place, for readers here and behind a service."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from potstill.cache.errors import InvalidInput, UnsupportedField
from potstill.cache.types import Fields

FIELD_NAMES = ("top_k", "draws", "entropy", "log_z", "dense")
"""What fields are called where they are chosen by name. The top-k comes with its tail and the label's logprob."""

_ADD_IT = "ask for what is kept, or add it with `potstill prefill` or `fill`"

_ATTRIBUTES = dict(zip(FIELD_NAMES, ("k", "draws", "entropy", "temperatures", "dense"), strict=True))


def wanted_fields(held: Fields, k: int | None, fields: Fields | None, who: str) -> Fields:
    """What to read of what is `held`: `fields`, by default all of it, with the top `k` when that is given.

    Raises:
        InvalidInput: a negative `k`. UnsupportedField: what is not held; the message names `who` holds it.
    """
    want = fields or held
    if k is not None and k < 0:
        raise InvalidInput(f"k is {k}; it must be at least 0")
    if k is not None and k != want.k:
        want = replace(want, k=k)
    if not want.draws and want.seed:
        want = replace(want, seed=0)  # it means nothing, and would make equal wishes differ
    problems = []
    if want.k > held.k:
        problems.append(f"k={want.k} was asked for, but only k={held.k} is kept")
    if want.draws and (want.draws, want.seed) != (held.draws, held.seed):
        kept = f"{held.draws} of seed {held.seed}" if held.draws else "none"
        problems.append(f"{want.draws} draws of seed {want.seed} were asked for, {kept} are kept")
    if want.temperatures and want.temperatures != held.temperatures:
        problems.append(f"temperatures {want.temperatures} were asked for, {held.temperatures or 'none'} are kept")
    problems += [f"{name} is not kept" for name in ("entropy", "dense") if getattr(want, name) > getattr(held, name)]
    if problems:
        raise UnsupportedField(f"{who}: {'; '.join(problems)}; {_way_out(held, want)}")
    return want


def _way_out(held: Fields, want: Fields) -> str:
    """A kind of field that is kept is never replaced; one that is not can be added."""
    replaced = {
        "k": 0 < held.k < want.k,
        "draws": bool(held.draws and want.draws) and (held.draws, held.seed) != (want.draws, want.seed),
        "temperatures": bool(held.temperatures and want.temperatures) and held.temperatures != want.temperatures,
    }
    names = [name for name, differs in replaced.items() if differs]
    if names:
        return f"ask for what is kept, or fill under another teacher name: {' and '.join(names)} cannot be changed"
    return _ADD_IT


def shared_fields(want: Fields, held: Fields) -> Fields | None:
    """What of the wanted fields a set holds; the wanted ones are known to be kept somewhere."""
    same_draws = (held.draws, held.seed) == (want.draws, want.seed)
    shared: dict[str, Any] = {
        "k": want.k if held.k >= want.k else 0,
        "draws": want.draws if same_draws else 0,
        "seed": want.seed if same_draws and want.draws else 0,
        "entropy": want.entropy and held.entropy,
        "temperatures": want.temperatures if held.temperatures == want.temperatures else (),
        "dense": want.dense and held.dense,
    }
    return Fields(**shared) if any(value for name, value in shared.items() if name != "seed") else None


def named_fields(held: Fields, names: Sequence[str] | None, k: int | None, who: str) -> Fields:
    """What to read of what is `held`, chosen by name; no names means all of it. `k` is as for `wanted_fields`.

    Raises:
        InvalidInput: an unknown name, or nothing at all. UnsupportedField: what is not held.
    """
    if names is None:
        return wanted_fields(held, k, None, who)
    unknown = sorted(set(names) - set(FIELD_NAMES))
    if unknown:
        raise InvalidInput(f"there is no field {unknown[0][:40]!r}; fields are {', '.join(FIELD_NAMES)}")
    missing = [name for name in dict.fromkeys(names) if not getattr(held, _ATTRIBUTES[name])]
    if missing:
        raise UnsupportedField(f"{who}: {', '.join(missing)} is not kept, {', '.join(names_of(held))} is; {_ADD_IT}")
    chosen: dict[str, Any] = {
        attribute: getattr(held, attribute) if name in names else type(getattr(held, attribute))()
        for name, attribute in _ATTRIBUTES.items()
    }
    # Of names without the top-k, the top k that is asked for comes too: as `k` has it everywhere.
    chosen["k"] = chosen["k"] if k is None else k
    return wanted_fields(held, k, Fields(**chosen, seed=held.seed if chosen["draws"] else 0), who)


def names_of(fields: Fields) -> list[str]:
    """The names of the fields that are there."""
    return [name for name, attribute in _ATTRIBUTES.items() if getattr(fields, attribute)]
