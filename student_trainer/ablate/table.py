"""The comparison as tables of a terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

from potstill.student_trainer.ablate.comparison import Comparison, Reached, Row
from potstill.student_trainer.ablate.intervals import Difference
from potstill.student_trainer.ablate.outcome import LOSS


def tables(found: Comparison) -> list[Table]:
    """Make a table of the loss, and one of the KL to each teacher."""
    measures = [name for name in found.measures if not name.startswith("top1 ")]
    return [_table(found, name) for name in measures]


def notes(found: Comparison) -> list[str]:
    """Say how the tables are to be read, and what failed."""
    told = [
        f"{found.documents:,} held-out documents, {found.tokens:,} tokens, {found.seeds} seeds",
        f"differences from {found.baseline}, paired; 95% intervals: other seeds, and these students on other documents",
        "noise: one of the intervals has zero in it; unknown: one of them is not known, below 10 documents or 2 seeds",
    ]
    if found.target_loss is not None:
        told.append(
            f"tokens: learnt until the held-out loss is {found.target_loss:.4f}, on a line between two evaluations, "
            "as a mean over the seeds that came there"
        )
    return told + [f"{row.cell}, {failure}" for row in found.rows for failure in row.failures]


def verdict(difference: Difference) -> str:
    """Put into a word what a difference of a loss means."""
    within = difference.within_noise
    if within is None:
        return "unknown"
    if within:
        return "noise"
    return "lower" if difference.value < 0 else "higher"


def title_of(measure: str) -> str:
    """Name a measure with its unit."""
    return "held-out loss, nats a token" if measure == LOSS else f"KL to {measure.removeprefix('kl ')}, nats a token"


def _table(found: Comparison, measure: str) -> Table:
    table = Table(title=title_of(measure), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    names = ("cell", "mean", "differs", "seeds", "documents", "", *(["tokens"] if measure == LOSS else []))
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
