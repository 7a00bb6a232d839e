"""The comparison as tables of a terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

from potstill.student_trainer.ablate.comparison import Comparison, Reached, Row
from potstill.student_trainer.ablate.intervals import Difference
from potstill.student_trainer.ablate.measures import ARROWS, LOSS, Section, counted_over, sections_of, title_of


def tables(found: Comparison) -> list[Table]:
    """Make a table of each measure that is shown."""
    return [_table(found, name) for section in sections_of(found.measures) for name in section.measures]


def notes(found: Comparison) -> list[str]:
    """Say how the tables are to be read, and what failed."""
    told = [
        f"{found.documents:,} held-out documents, {found.tokens:,} tokens, {found.seeds} seeds",
        f"differences from {found.baseline}, paired; 95% intervals: other seeds, and these students on other documents",
        "noise: an interval has zero in it; unknown: one is missing, below 2 seeds or 10 documents that differ",
    ]
    if found.target_loss is not None:
        told.append(
            f"tokens: learnt until the held-out loss is {found.target_loss:.4f}, on a line between two evaluations, "
            "as a mean over the seeds that came there"
        )
    told += [f"{section.title}: {more_than_noise(found, section)}" for section in sections_of(found.measures)]
    told += [f"note: {note}" for note in found.notes]
    return told + [f"{row.cell}, {failure}" for row in found.rows for failure in row.failures]


def verdict(difference: Difference) -> str:
    """Put into a word what a difference means."""
    within = difference.within_noise
    if within is None:
        return "unknown"
    if within:
        return "noise"
    return "lower" if difference.value < 0 else "higher"


def more_than_noise(found: Comparison, section: Section) -> str:
    """Say which differences of a section's measures are more than noise."""
    verdicts = [
        (f"{title_of(name).partition(', ')[0]} of {row.cell}", verdict(row.differences[name]))
        for name in section.measures
        for row in found.rows
        if name in row.differences
    ]
    sure = [f"{what} ({word})" for what, word in verdicts if word in ("lower", "higher")]
    unknown = sum(word == "unknown" for _, word in verdicts)
    may_be = f", {unknown} may be" if unknown else ""
    return (
        f"{len(sure)} of {len(verdicts)} differences are more than noise{may_be}{': ' if sure else ''}{'; '.join(sure)}"
    )


def _table(found: Comparison, measure: str) -> Table:
    title = title_of(measure) + ARROWS[found.higher_is_better[measure]]
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    names = ("cell", "mean", "differs", "seeds", counted_over(measure), "", *(["tokens"] if measure == LOSS else []))
    for name in names:
        left = name in ("cell", "")
        table.add_column(name, justify="left" if left else "right", no_wrap=not left)
    for row in found.rows:
        table.add_row(*_cells(row, measure, found.seeds))
    return table


def _cells(row: Row, measure: str, seeds: int) -> list[str]:
    name = row.cell if row.seeds == seeds else f"{row.cell} ({row.seeds} of {seeds})"
    mean = f"{row.means[measure]:.4f}" if measure in row.means else "-"
    reached = [] if measure != LOSS else ["-" if row.reached is None else _tokens(row.reached, seeds)]
    difference = row.differences.get(measure)
    if difference is None:
        return [name, mean, "", "", "", "", *reached]
    by_seed, by_document = difference.over_seeds, difference.over_documents
    told = (
        "-" if by_seed is None else f"\u00b1{(by_seed.high - by_seed.low) / 2:.4f}",
        "-" if by_document is None else f"{by_document.low:+.3f} to {by_document.high:+.3f}",
    )
    return [name, mean, f"{difference.value:+.4f}", *told, verdict(difference), *reached]


def _tokens(reached: Reached, seeds: int) -> str:
    some = "" if reached.seeds == seeds else f" ({reached.seeds} of {seeds})"
    return f"{reached.tokens:,.0f}{some}"
