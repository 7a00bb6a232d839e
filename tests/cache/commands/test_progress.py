from __future__ import annotations

import pytest

from potstill.cache.commands.progress import progress


def test_the_end_is_told_once_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("prefill small", "tokens") as show:
        show(50, 100, "0/1 shard")
        for note in ("0/1 shard", "0/1 shard", "0/1 shard", "1/1 shard"):
            show(100, 100, note)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(", ")[2] for line in lines] == ["0/1 shard", "1/1 shard"]
