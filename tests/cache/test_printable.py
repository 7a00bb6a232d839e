from __future__ import annotations

import pytest

from potstill.cache.commands.tables import table_text
from potstill.cache.errors import InvalidInput
from potstill.cache.printable import printable
from potstill.clients.doctor.findings import Verdict, finding


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Qwen/Qwen3-0.6B für 中文 🙂", "Qwen/Qwen3-0.6B für 中文 🙂"),
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("a\x9b31mb", "a\\x9b31mb"),
        ("name\rother", "name\\rother"),
        ("two\nlines", "two\nlines"),
        ("\u202eevil\u200b", "\\u202eevil\\u200b"),
        ("\ud800", "\\ud800"),
    ],
)
def test_what_a_terminal_obeys_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_errors_tables_and_findings_are_printable() -> None:
    evil = "\x1b]52;c;cm0gLXJm\x07"
    told = finding("check \x1b[8m", evil, Verdict("fail", evil, evil))
    shown = [InvalidInput(evil).detail, table_text(("model",), [(evil,)], 80), told.check, told.subject, told.detail]
    assert all(text.replace("\n", "").isprintable() for text in [*shown, told.way_out])
