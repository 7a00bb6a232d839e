"""Tables that fit the terminal they are printed on, without a broken word."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from potstill.cache.printable import printable

_GAP = "  "

Row = TypeVar("Row")


def print_table(columns: Mapping[str, Callable[[Row], object]], rows: Iterable[Row], *, title: str = "") -> None:
    """Print the table that `table_text` makes for this terminal, and an empty line after one with a title.

    `columns` has a function from a row to its cell under each heading. The width is that of the terminal, `COLUMNS`
    where it is set, and 80 for a pipe.
    """
    cells = ([cell(row) for cell in columns.values()] for row in rows)
    text = table_text(list(columns), cells, shutil.get_terminal_size().columns)
    print(f"{title}\n{text}\n" if title else text)


def table_text(columns: Sequence[str], rows: Iterable[Sequence[object]], width: int) -> str:
    """Lay out a table in at most `width` columns of text, if that can be done without wrapping a cell.

    The first layout that fits: a line a row; a line a column, the rows side by side; one row below the other.
    """
    table = [list(columns), *([printable(str(cell)) for cell in row] for row in rows)]
    turned = [list(column) for column in zip(*table, strict=True)]
    for lines in (table, turned):
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        if sum(widths) + len(_GAP) * (len(widths) - 1) <= width:
            return _text(lines, widths)
    longest = max(map(len, columns))
    return "\n\n".join(_text([*zip(columns, row, strict=True)], [longest, 0]) for row in table[1:])


def _text(lines: Iterable[Sequence[str]], widths: Sequence[int]) -> str:
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(_GAP.join(line).rstrip() for line in padded)
