"""Check of wanted fields against those that are kept, in one place for local readers and for the service."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from potstill.cache.errors import InvalidInput, UnsupportedField
from potstill.cache.fields import FIELDS, TOP_K, Field, Fields

_ADD_IT = "ask for what is kept, or add it with `potstill prefill` or `fill`"


def wanted_fields(held: Fields, k: int | None, fields: Fields | None, who: str) -> Fields:
    """Choose the fields to read: `fields`, by default all that is `held`, with the top `k` when that is given.

    Raises:
        InvalidInput: `k` is negative. UnsupportedField: a field is not held; the message begins with `who`.
    """
    want = fields or held
    if k is not None and k < 0:
        raise InvalidInput(f"k is {k}; it must be at least 0")
    if k is not None and k != want.k:
        want = replace(want, k=k)
    if not want.draws and want.seed:
        want = replace(want, seed=0)  # it means nothing, and would make equal wishes differ
    lacking = [each for each in FIELDS if not each.serves(held, want)]
    if lacking:
        problems = "; ".join(_problem(each, held, want) for each in lacking)
        # A field that is kept is never replaced by one with another setting; one that is not kept can be added.
        names = " and ".join(each.asked_by for each in lacking if each.is_asked(held))
        kept = f"ask for what is kept, or fill under another teacher name: {names} cannot be changed"
        raise UnsupportedField(f"{who}: {problems}; {kept if names else _ADD_IT}")
    return want


def holders(kept: Sequence[Fields], want: Fields) -> Iterator[tuple[int, Fields]]:
    """Choose which of several sets to read wanted fields from: the place of each, and what to read there."""
    left: Fields | None = want
    for i, held in enumerate(kept):
        part = left and left.only(field for field in FIELDS if field.serves(held, left))
        if left and part:
            yield i, part
            # Jobs that add fields at the same moment may leave two sets with one field: it is read from the first.
            left = left.without(part)


def _problem(field: Field, held: Fields, want: Fields) -> str:
    if field is TOP_K:
        return f"k={want.k} was asked for, but only k={held.k} is kept"
    if getattr(want, field.asked_by) is True:
        return f"{field.name} is not kept"
    asked, there = (fields.only([field]) for fields in (want, held))
    assert asked is not None, "what is not asked for is not lacking"
    return f"{asked.text} were asked for, {there.text if there else 'none'} are kept"


def named_fields(held: Fields, names: Sequence[str] | None, k: int | None, who: str) -> Fields:
    """Choose the fields to read by name; None means all that is `held`. `k` is as for `wanted_fields`.

    Raises:
        InvalidInput: a name is unknown, or nothing is chosen. UnsupportedField: a field is not held.
    """
    if names is None:
        return wanted_fields(held, k, None, who)
    known, there = ([each.name for each in fields] for fields in (FIELDS, held.asked))
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise InvalidInput(f"there is no field {unknown[0][:40]!r}; fields are {', '.join(known)}")
    missing = [name for name in dict.fromkeys(names) if name not in there]
    if missing:
        raise UnsupportedField(f"{who}: {', '.join(missing)} is not kept, {', '.join(there)} is; {_ADD_IT}")
    chosen = held.only(each for each in FIELDS if each.name in names)
    # `k` asks for the top-k even when the names do not: as it does everywhere else.
    if chosen is None:
        chosen = Fields(k=k or 0)
    elif k is not None:
        chosen = replace(chosen, k=k)
    return wanted_fields(held, k, chosen, who)
