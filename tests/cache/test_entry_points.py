from __future__ import annotations

import pytest

from potstill.cache.entry_points import name_and_model
from potstill.cache.errors import InvalidInput


def test_a_teacher_argument() -> None:
    assert name_and_model("far=http://h:1#x=y") == ("far", "http://h:1#x=y")
    for bad in ("smol", "=m", "smol=", ""):
        with pytest.raises(InvalidInput, match="--teacher .*: write NAME=MODEL"):
            name_and_model(bad)
