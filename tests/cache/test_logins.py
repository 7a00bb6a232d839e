"""What is left of a text when the logins of its URLs are taken out."""

from __future__ import annotations

import tracemalloc

import pytest

from potstill.cache.errors import InvalidInput
from potstill.cache.logins import without_login


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://any:SECRET@host:8700/v1", "http://host:8700/v1"),
        ("http://SECRET@host", "http://host"),
        ("opening http://any:SECRET@host#big, then https://b:SECRET@c", "opening http://host#big, then https://c"),
        ("http://any:SEC/RE?T#@host", "http://host"),
        ("far=http://any:SECRET@up:8700#smol", "far=http://up:8700#smol"),
        ("'any:SECRET@collector:4318/v1/traces' is no URL", "'collector:4318/v1/traces' is no URL"),
        ("//u:SECRET@h", "//h"),
        ("http:/u:SECRET@h", "h"),
        ("far=any:SECRET@up", "far=up"),
        ("any:SE//CRET@up", "up"),
        ("a=any:SECRET@up//b:SECRET@c", "a=up//c"),
        ("http://any:SE=CR:ET@up", "http://up"),
        ("any:SECRET@", ""),
    ],
)
def test_no_login_is_left(text: str, shown: str) -> None:
    assert without_login(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:8700",
        "org/model@main",
        "smol=org/model@v1.0",
        "a row of 5 tokens: mail ann@example.org",
        "s3://bucket/prefix",
        "vllm @ 0.32: 3 of 4",
    ],
)
def test_what_is_no_login_stays(text: str) -> None:
    assert without_login(text) == text


def test_of_a_long_message_begin_and_end_are_left() -> None:
    error = InvalidInput(f"the name {'//any:SECRET@h/' * 10_000!r} is not a name; choose another")
    assert len(error.detail) < 1100
    assert error.detail.startswith("the name '//h/")
    assert error.detail.endswith("' is not a name; choose another")
    assert "SECRET" not in error.detail


@pytest.mark.parametrize("place", ["=a:b@", "'a:b", "// ", " a:b@", "//"])
def test_of_a_text_with_a_million_places_few_are_searched(place: str) -> None:
    tracemalloc.start()
    try:
        assert len(InvalidInput(f"{place * 300_000} is wrong").detail) < 1100
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("behind", ["", " is wrong"])
def test_a_login_longer_than_what_is_searched_is_not_cut(behind: str) -> None:
    detail = InvalidInput(f"{'a ' * 600}http://any:{'SECRET' * 10_000}@host{behind}").detail
    assert "SECRET" not in detail
    assert detail.endswith(behind)


def test_an_errors_line_has_none() -> None:
    error = InvalidInput("http://any:SECRET@host has no teacher")
    assert error.detail == str(error) == "http://host has no teacher"
